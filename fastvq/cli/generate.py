"""The commands that use a trained model: ``sample``, ``reconstruct``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._bar import bar
from fastvq._files import remove_leftovers
from fastvq._names import names_like
from fastvq._shards import description_of
from fastvq.cli.images import open_data
from fastvq.cli.project import Project, choose_device, is_one_model, load_pipeline
from fastvq.data import load_images, load_picture, psnr, save_animation, save_grid
from fastvq.data.animation import require_animation
from fastvq.data.base import spread_over_classes
from fastvq.data.grid import grid_size, is_picture, require_picture
from fastvq.errors import ArgumentError, FileConflictError
from fastvq.models import HierarchicalVQVAE
from fastvq.sampling import Pipeline, Shard, sample_shard
from fastvq.sampling.autoencoder import AnyAutoencoder
from fastvq.sampling.coding import reconstruct as reconstruct_images
from fastvq.sampling.parts import PREFIX
from fastvq.sampling.samples import SETTINGS_FILE, write_samples
from fastvq.training import load_weights

# Of samples by class.
_MOST_COLUMNS = 32


def sample(arguments: argparse.Namespace) -> None:
    if arguments.shard is not None:
        _sample_part(arguments)
        return
    if arguments.images is not None:
        raise ArgumentError(
            "--images: for parts; without --shard a folder holds PNGs anyway. For all samples in one tar: --shard 0/1"
        )
    if arguments.keep_levels is not None and arguments.like is None:
        raise ArgumentError("--keep-levels: says what to keep of --like IMAGE, which is missing")
    picture = require_free_outputs(arguments)
    pipeline = load_pipeline(
        arguments.checkpoint, arguments.pretrained, choose_device(arguments.device), arguments.weights
    )
    classes = classes_asked(pipeline, arguments.label)
    columns, captions = columns_by_class(pipeline, arguments.n, classes)
    height, width = grid_size(arguments.n, *pipeline.image_shape[1:], columns, captions=captions)[:2]
    if picture:
        require_picture("--out", arguments.out, height, width)
    if arguments.animate is not None:
        require_animation("--animate", arguments.animate, height, width)
    kept = _upper_codes(pipeline, arguments)
    labels = pipeline.labels(range(arguments.n), classes)
    samples = pipeline.sample(arguments.n, label=labels, codes=kept, **draw_settings(arguments))
    if picture:
        save_grid(arguments.out, samples.images, columns, captions=captions, overwrite=arguments.overwrite)
    else:
        settings = record(arguments)
        if kept:
            settings |= {"like": str(arguments.like), "keep_levels": len(kept)}
        write_samples(arguments.out, samples, settings, overwrite=arguments.overwrite)
    print(f"{arguments.n} samples in {arguments.out} (seed {samples.seed})")
    if arguments.animate is not None:
        known = [torch.full_like(grid, level < len(kept), dtype=torch.bool) for level, grid in enumerate(samples.codes)]
        frames = pipeline.frames(samples.codes, known=known)
        shown = bar("frames", show=not arguments.quiet, items=frames)
        save_animation(arguments.animate, shown, columns, captions=captions, overwrite=arguments.overwrite)
        print(f"the grids being filled in {arguments.animate}")


def require_free_outputs(arguments: argparse.Namespace) -> bool:
    """Find out what cannot be written before anything is loaded; returns whether ``--out`` is a picture."""
    picture = is_picture("--out", arguments.out)
    check_free(arguments.out, arguments.overwrite, picture)
    if getattr(arguments, "animate", None) is not None:
        require_animation("--animate", arguments.animate)
        if arguments.animate.resolve() == arguments.out.resolve():
            raise ArgumentError(f"--animate: {arguments.animate} is --out as well; choose another name")
        check_free(arguments.animate, arguments.overwrite, picture=True, option="--animate")
    if arguments.n < 1:
        raise ArgumentError(f"-n: must be at least 1, got {arguments.n}")
    return picture


def _upper_codes(pipeline: Pipeline, arguments: argparse.Namespace) -> tuple[Tensor, ...]:
    """Codes that ``--like`` and ``--keep-levels`` give."""
    if arguments.like is None:
        return ()
    levels = pipeline.vqvae.num_levels
    count = 1 if arguments.keep_levels is None else arguments.keep_levels
    if levels == 1:
        raise ArgumentError("--like: this model has a single level, so nothing would be left to draw")
    if not 1 <= count < levels:
        raise ArgumentError(f"--keep-levels: expected 1..{levels - 1} of this model's {levels}, got {count}")
    channels, height, width = pipeline.image_shape
    return pipeline.encode(load_picture(arguments.like, (height, width), channels=channels))[:count]


def _sample_part(arguments: argparse.Namespace) -> None:
    shard = Shard.parse(arguments.shard)
    if arguments.seed is None:
        raise ArgumentError("--seed: --shard needs one, the same for all parts")
    if arguments.overwrite:
        raise ArgumentError("--overwrite: finished parts are kept; remove them, or choose another folder")
    for option in ("like", "keep_levels", "animate"):
        if getattr(arguments, option) is not None:
            raise ArgumentError(f"--{option.replace('_', '-')}: not for parts; leave out --shard")
    if is_picture("--out", arguments.out):
        raise ArgumentError(f"--out: --shard writes to a folder, got {arguments.out}")
    pipeline = load_pipeline(
        arguments.checkpoint, arguments.pretrained, choose_device(arguments.device), arguments.weights
    )
    path = shard.path(arguments.out, PREFIX)
    there = description_of(path).is_file()
    sample_shard(
        pipeline,
        arguments.n,
        shard,
        arguments.out,
        label=classes_asked(pipeline, arguments.label),
        images=arguments.images,
        **draw_settings(arguments),
    )
    indices = shard.range(arguments.n)
    what = f"samples {indices.start}..{indices.stop - 1} of {arguments.n}" if indices else "no samples"
    print(f"part {shard}: {what} {'were finished before' if there else 'are'} in {path} (seed {arguments.seed})")


def reconstruct(arguments: argparse.Namespace) -> None:
    require_picture("--out", arguments.out)
    check_free(arguments.out, arguments.overwrite, picture=True)
    if arguments.n < 1:
        raise ArgumentError(f"-n: must be at least 1, got {arguments.n}")
    device = choose_device(arguments.device)
    model, description = _autoencoder(arguments, device)
    dataset = open_data(
        arguments.data,
        arguments.size or description["size"],
        model.config.in_channels,
        skip_broken=arguments.skip_broken or description["skip_broken"],
        exclude=[] if arguments.checkpoint is None else [arguments.checkpoint],
        leave_out_empty=True,
        quiet=arguments.quiet,
    )
    model.code_shapes(dataset.size)
    shown = spread_over_classes(dataset.labels, len(dataset), arguments.n)
    require_picture("--out", arguments.out, *grid_size(2 * len(shown), *dataset.size, len(shown))[:2])
    originals = load_images(dataset, shown)
    reconstructions, mse = reconstruction(model, originals)
    save_grid(arguments.out, torch.cat([originals, reconstructions]), len(originals), overwrite=arguments.overwrite)
    print(f"{len(originals)} images and reconstructions in {arguments.out}: MSE {mse:.5f}, PSNR {psnr(mse):.2f} dB")


def reconstruction(model: AnyAutoencoder, originals: Tensor) -> tuple[Tensor, float]:
    """Decoded codes of images, on the CPU, and the mean squared error."""
    reconstructions = reconstruct_images(model, originals).cpu()
    return reconstructions, float(F.mse_loss(reconstructions, originals))


def draw_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What samples are drawn with, as sampling is told."""
    temperature = arguments.temperature
    return {
        "temperature": temperature[0] if len(temperature) == 1 else temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "progress": not arguments.quiet,
        "engine": arguments.engine,
        "micro_batch": arguments.micro_batch,
        "precision": arguments.precision,
    }


def record(arguments: argparse.Namespace) -> dict[str, object]:
    """What a folder of samples says of how they were drawn."""
    return {
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "engine": arguments.engine,
        "precision": arguments.precision,
    }


def classes_asked(pipeline: Pipeline, label: Sequence[str] | None) -> tuple[int, ...] | None:
    """The classes that take turns: those of ``--label``, or all; None without classes."""
    classes, names = pipeline.num_classes, pipeline.class_names or ()
    if label is None:
        return pipeline.classes()
    if classes is None:
        raise ArgumentError(f"--label: this model knows no classes, got {' '.join(label)}")
    numbers = []
    for text in label:
        if text not in names and (not text.isdecimal() or int(text) >= classes):
            known = f", or a name: {names_like(text, names)}" if names else ""
            raise ArgumentError(f"--label: expected a number in 0..{classes - 1}{known}; got {text!r}")
        numbers.append(names.index(text) if text in names else int(text))
    return tuple(numbers)


def columns_by_class(pipeline: Pipeline, n: int, classes: Sequence[int] | None) -> tuple[int | None, list[str] | None]:
    """A column for each of the classes that take turns, and their names; None where there is one class, or too many."""
    if classes is None or not len(classes) > 1 or min(n, len(classes)) > _MOST_COLUMNS:
        return None, None
    shown, names = classes[:n], pipeline.class_names
    return len(shown), [str(number) if names is None else names[number] for number in shown]


def _autoencoder(arguments: argparse.Namespace, device: str) -> tuple[HierarchicalVQVAE, dict[str, Any]]:
    """The model, and what is known of the images it was trained on: ``size`` (perhaps None) and ``skip_broken``."""
    checkpoint = arguments.checkpoint
    if checkpoint is not None and is_one_model(checkpoint):
        model = load_weights(checkpoint, weights=arguments.weights, device=device)
        if not isinstance(model, HierarchicalVQVAE):
            raise ArgumentError(f"--checkpoint: {checkpoint} holds a {type(model).__name__}, expected an autoencoder")
        return model, {"size": None, "skip_broken": False}
    if checkpoint is not None and Project(checkpoint).vqvae.is_dir():
        project = Project(checkpoint)
        return project.load_vqvae(device), project.read_data()
    pipeline = load_pipeline(checkpoint, arguments.pretrained, device, arguments.weights)
    assert isinstance(pipeline.vqvae, HierarchicalVQVAE)  # as all that are stored
    return pipeline.vqvae, {"size": pipeline.image_shape[1:], "skip_broken": False}


def check_free(out: Path, overwrite: bool, picture: bool, option: str = "--out") -> None:
    """Find out that the result cannot be written before computing it."""
    remove_leftovers(out)
    taken = out.exists() and (picture or not out.is_dir() or any(out.iterdir()))
    if taken and not overwrite:
        raise FileConflictError(f"{option}: {out} exists already; pass --overwrite or another name")
    if out.exists() and out.is_dir() == picture:
        raise FileConflictError(f"{option}: {out} is a {'folder' if picture else 'file'} and stays as it is")
    if out.is_dir() and taken and not (out / SETTINGS_FILE).is_file():
        raise FileConflictError(f"{option}: {out} holds other things than samples and stays as it is")
