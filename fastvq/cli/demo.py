"""``fastvq demo``: the whole system on handwritten digits, small enough for two CPU cores."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvq._files import remove_leftovers
from fastvq._lock import locked
from fastvq._schema import number, require_entries
from fastvq.cli.generate import columns_by_class, reconstruction
from fastvq.cli.images import DIGITS, start_project
from fastvq.cli.project import Project, augmentation, choose_device, require_folder_name
from fastvq.cli.resume import code_init
from fastvq.cli.speed import compare_engines, naive_seconds
from fastvq.cli.train import fit_to_codes, preview_of
from fastvq.data import CodeDataset, Digits, extract_codes, load_images, save_grid, split_indices
from fastvq.data.base import spread_over_classes
from fastvq.errors import ArgumentError, CorruptFileError, FileConflictError
from fastvq.models import PriorConfig, VQVAEConfig, preset
from fastvq.sampling import Pipeline, shipped
from fastvq.training import TrainConfig, train_prior, train_vqvae
from fastvq.training.log import last_validation
from fastvq.training.run import CONFIG, RunFolder

TEMPERATURE = 0.9
_STEPS = {"vqvae": 900, "prior0": 600, "prior1": 1000}
_COPIES = 8
_SHIFT = 2
_PER_CLASS = 10
_HELD_OUT = 20
# That the naive engine is given to show how slow it is.
_NAIVE_SECONDS = 10.0
# Ships with the package, where it does.
_COLOUR_MODEL, _COLOUR, _COLOUR_PER_CLASS = "emoji", "emoji.png", 8


def demo(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    device = choose_device(arguments.device)
    _fill_in(arguments)
    if not (math.isfinite(arguments.effort) and arguments.effort > 0):
        raise ArgumentError(f"--effort: must be positive, got {arguments.effort}")
    if arguments.label is not None and not 0 <= arguments.label < Digits.num_classes:
        raise ArgumentError(f"--label: expected a digit in 0..9, got {arguments.label}")
    require_folder_name(arguments.out)
    project, progress = Project(arguments.out), not arguments.quiet
    dataset = Digits(32)
    settings = {"skip_broken": False, "flip": False, "shift": _SHIFT, "validation": 0.1, "seed": arguments.seed}
    augment = augmentation(settings)
    training, validation = split_indices(len(dataset), 0.1, arguments.seed)
    print(f"1/5  training the autoencoder on {len(training)} digits of 32 x 32 pixels")
    _, vqvae_config = preset("digits")
    assert isinstance(vqvae_config, VQVAEConfig)
    config = _config(arguments, "vqvae", device)
    with locked(project.vqvae):
        project.require_free(resume=arguments.resume)
        start_project(project, DIGITS, dataset, settings)
        resume = arguments.resume and (project.vqvae / CONFIG).is_file()
        vqvae = train_vqvae(
            dataset,
            vqvae_config,
            config,
            project.vqvae,
            augment=augment,
            resume=resume,
            notes={"effort": arguments.effort},
            progress=progress,
        )
    metrics = _validation_metrics(project.vqvae, "mse", "psnr")
    print(
        f"     each digit is now {_grids(vqvae.code_shapes(dataset.size))} codes of {vqvae_config.num_codes}; "
        f"validation MSE {metrics['mse']:.4f}, PSNR {metrics['psnr']:.1f} dB"
    )

    print(f"2/5  writing the codes of {_COPIES} shifted copies of each digit")
    for indices, folder, copies in ((training, project.codes, _COPIES), (validation, project.validation_codes, 1)):
        extract_codes(
            vqvae,
            dataset,
            indices,
            folder,
            augment=augment if copies > 1 else None,
            copies=copies,
            seed=arguments.seed,
            progress=progress,
        )

    print("3/5  training a prior over the codes of each level, given the digit's class")
    codes = CodeDataset(project.codes)
    for level, name in enumerate(("digits-top", "digits-bottom")):
        _, template = preset(name)
        assert isinstance(template, PriorConfig)
        run = project.prior(level)
        resume = arguments.resume and (run / CONFIG).is_file()
        alike = not resume or code_init(RunFolder(run).record()) == "codebooks"
        train_prior(
            project.codes,
            level,
            fit_to_codes(template, codes, level, dataset.num_classes),
            _config(arguments, f"prior{level}", device),
            run,
            validation_folder=project.validation_codes,
            resume=resume,
            progress=progress,
            sample_images=preview_of(vqvae, CodeDataset(project.validation_codes), level),
            codebooks=vqvae.codebooks if alike else None,
        )
        bits = _validation_metrics(run, "bits")["bits"]
        uniform = math.log2(codes.num_codes[level])
        print(f"     level {level}: validation NLL {bits:.3f} bits per code (all codes alike: {uniform:.0f})")

    print(f"4/5  sampling at temperature {TEMPERATURE}")
    pipeline = Pipeline.from_pretrained(project.path, device=device)
    for name in ("reconstructions.png", "samples.png", _COLOUR, "pipeline"):
        remove_leftovers(project.path / name)
    _write_pictures(pipeline, dataset, validation, arguments)
    pipeline.save_pretrained(project.path / "pipeline", overwrite=True)
    print(f"     {project.path / 'reconstructions.png'}: held-out digits above, what their codes keep below")
    print(f"     {project.path / 'samples.png'}: new digits, " + _asked(arguments.label))
    _show_more(pipeline, arguments, device)
    print(f"done in {time.perf_counter() - began:.0f} s; more: fastvq sample --checkpoint {project.path} --label 7")


def _fill_in(arguments: argparse.Namespace) -> None:
    """Seed and effort where they are not typed: the defaults, or with ``--resume`` those of the demo there."""
    project = Project(arguments.out)
    there: dict[str, Any] = {"seed": 0, "effort": 1.0}
    if arguments.resume and project.data.is_file():
        there["seed"] = project.read_data()["seed"]
        run = RunFolder(project.vqvae)
        if run.config.is_file():
            notes = run.record().get("notes", {})
            require_entries(run.config, notes, {"effort": number()}, absent=True)
            there["effort"] = notes.get("effort", there["effort"])
            if arguments.effort not in (None, there["effort"]):
                raise FileConflictError(
                    f"--effort: {project.path} was started with {there['effort']}, got {arguments.effort}"
                )
    for name, value in there.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _config(arguments: argparse.Namespace, name: str, device: str) -> TrainConfig:
    steps = max(1, round(_STEPS[name] * arguments.effort))
    return TrainConfig(
        steps=steps,
        batch_size=64,
        learning_rate=2e-3,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        warmup_steps=min(50, steps),
        final_lr_fraction=0.05,
        ema_decay=0.99,
        seed=arguments.seed,
        image_every=200,
        checkpoint_every=200,
        device=device,
    )


def _write_pictures(pipeline: Pipeline, dataset: Digits, validation: np.ndarray, arguments: argparse.Namespace) -> None:
    assert dataset.labels is not None
    labels = dataset.labels[torch.from_numpy(validation)]
    shown = spread_over_classes(labels, len(validation), _HELD_OUT)
    originals = load_images(dataset, validation[shown])
    reconstructions, _ = reconstruction(pipeline.vqvae, originals)
    save_grid(
        arguments.out / "reconstructions.png",
        torch.cat([originals, reconstructions]),
        len(originals),
        captions=[dataset.class_names[label] for label in labels[torch.from_numpy(shown)]],
        overwrite=True,
    )
    classes = None if arguments.label is None else [arguments.label]
    _write_samples(pipeline, arguments.out / "samples.png", _PER_CLASS * Digits.num_classes, classes, arguments)


def _write_samples(
    pipeline: Pipeline, path: Path, n: int, classes: Sequence[int] | None, arguments: argparse.Namespace
) -> None:
    """New images, a column for each class."""
    classes = classes or pipeline.classes()
    columns, captions = columns_by_class(pipeline, n, classes)
    samples = pipeline.sample(
        n, label=classes, temperature=TEMPERATURE, seed=arguments.seed, progress=not arguments.quiet
    )
    save_grid(path, samples.images, columns, captions=captions, overwrite=True)


def _show_more(pipeline: Pipeline, arguments: argparse.Namespace, device: str) -> None:
    """Speed, on the colour model that ships with the package if it is quick enough here, and pictures of that model."""
    progress, title, colour = not arguments.quiet, "digits", None
    seconds = _NAIVE_SECONDS * min(1.0, arguments.effort)
    folder = shipped().get(_COLOUR_MODEL)
    if folder is not None:
        colour = Pipeline.from_pretrained(folder, device=device)
        if naive_seconds(colour) <= 3 * seconds:
            pipeline, title = colour, _COLOUR_MODEL
    print(f"5/5  sampling the finest prior of {title} once by its definition and once without recomputing")
    print(f"     {compare_engines(pipeline, seconds, seed=arguments.seed, progress=progress)}")
    if colour is not None:
        path = arguments.out / _COLOUR
        _write_samples(colour, path, _COLOUR_PER_CLASS * (colour.num_classes or 1), None, arguments)
        print(f"     {path}: from the model that ships as --pretrained {_COLOUR_MODEL}")


def _validation_metrics(run: Path, *names: str) -> dict[str, float]:
    """The last validation of a training run."""
    found = last_validation(run, *names)
    if not found:
        raise CorruptFileError(f"{run}: its log of metrics holds no validation")
    return found


def _grids(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " + ".join(f"{height} x {width}" for height, width in shapes)


def _asked(label: int | None) -> str:
    return "a column for each class" if label is None else f"all of class {label}"
