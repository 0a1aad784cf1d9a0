"""The commands that fill a project folder: ``train-vqvae``, ``extract``, ``train-prior``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq._check import require_positive_int
from fastvq._lock import locked
from fastvq.cli.codebook import say_use_of_codes, say_use_of_run
from fastvq.cli.images import (
    image_size,
    open_new_images,
    open_project_images,
    recorded_folder,
    require_same_settings,
    require_shift,
    split_images,
    start_project,
)
from fastvq.cli.loading import advise, keep_images, loading_threads, remember, require_cache_place, with_workers
from fastvq.cli.project import Project, augmentation, choose_device, say_next_priors
from fastvq.cli.resume import (
    code_init,
    follow_recipe,
    model_config,
    notes,
    preset_for_codes,
    preset_name,
    recorded,
    shown,
    train_config,
)
from fastvq.cli.summary import Start, announce, of_codes, of_images
from fastvq.data import Augment, CodeDataset, ImageDataset, Shard, extract_codes, extract_shard, split_indices
from fastvq.data.base import spread_over_classes
from fastvq.data.codes import DESCRIPTION
from fastvq.distributed import join
from fastvq.errors import ArgumentError, FileConflictError
from fastvq.models import HierarchicalVQVAE, Prior, PriorConfig, VQVAEConfig, build
from fastvq.models.stored import outline
from fastvq.sampling import sample
from fastvq.sampling.project import how_to_sample_elsewhere, made_elsewhere
from fastvq.training import Picture, TrainConfig
from fastvq.training import train_prior as train_prior_on_codes
from fastvq.training import train_vqvae as train_vqvae_on_images
from fastvq.training.weights import describe_start

_PICTURES, _COLUMNS = 16, 10


def train_vqvae(arguments: argparse.Namespace) -> None:
    with join() as group, contextlib.ExitStack() as stack:
        arguments.quiet |= not group.first
        with group.together():
            project, dataset, model, config, settings, augment, data, taken = _prepare_vqvae(arguments)
            split = split_indices(len(dataset), config.validation_fraction, config.seed)
            start = Start(
                run=project.vqvae,
                model=model,
                config=config,
                data=of_images(dataset, *map(len, split)),
                rows=len(split[0]),
                preset=preset_name(arguments, project.vqvae),
                size=dataset.size,
                taken=taken,
                processes=group.size,
            )
            if not announce(arguments, start):
                return
        with group.together():
            if group.first:
                stack.enter_context(locked(project.vqvae))
                project.require_free(resume=arguments.resume)
                start_project(project, data, dataset, settings)
                remember(dataset)
        advise(
            dataset, f"in a new run with --skip-broken, from the weights of this one with --init-from {project.vqvae}"
        )
        keep_images(arguments, project, dataset, group)
        config = with_workers(arguments, config, dataset, group)
        train_vqvae_on_images(
            dataset,
            model,
            config,
            project.vqvae,
            augment=augment,
            resume=arguments.resume,
            init_from=arguments.init_from,
            notes=notes(arguments),
            progress=shown(arguments),
        )
        if group.first:
            # What is wrong has been said already where progress is shown.
            say_use_of_run(project, warn=arguments.quiet)
            print(f"autoencoder in {project.vqvae / 'model'}; next: fastvq extract --run {arguments.run}")


class _Stage1(NamedTuple):
    """What ``train-vqvae`` has made of its options, before anything is written."""

    project: Project
    dataset: ImageDataset
    model: VQVAEConfig
    config: TrainConfig
    settings: dict[str, Any]
    augment: Augment | None
    data: str
    taken: dict[str, Any]


def _prepare_vqvae(arguments: argparse.Namespace) -> _Stage1:
    device = choose_device(arguments.device)
    project = Project(arguments.run)
    taken = follow_recipe(arguments)
    overrides = {} if arguments.channels is None else {"in_channels": arguments.channels}
    model = model_config(arguments, project.vqvae, VQVAEConfig, **overrides)
    config = train_config(arguments, project.vqvae, device, validation_fraction=0.1)
    stride = math.prod(model.strides)
    if any(side < 1 or side % stride for side in arguments.size or ()):
        raise ArgumentError(
            f"--size: expected positive multiples of {stride}, got {' '.join(map(str, arguments.size))}"
        )
    project.require_free(resume=arguments.resume)
    there: dict[str, Any] = {"size": None, "skip_broken": False, "flip": False, "shift": 0, "draft": True}
    if arguments.resume:
        there = {"draft": False, **project.read_data()}
    settings = {
        name: there[name] if getattr(arguments, name) is None else getattr(arguments, name)
        for name in ("skip_broken", "flip", "shift", "draft")
    }
    settings |= {"validation": config.validation_fraction, "seed": config.seed}
    augment = augmentation(settings)
    data = arguments.data
    if data is None:
        if not arguments.resume:
            raise ArgumentError("--data: a new run needs a folder of images, or 'digits'")
        data = recorded_folder(project, there)
    require_cache_place(arguments, data)
    size = arguments.size or there["size"]
    pair = None if size is None else image_size(size)
    if pair is not None:
        require_shift(settings["shift"], pair)
    if arguments.resume:
        known = {"channels": model.in_channels} if pair is None else {"channels": model.in_channels, "size": list(pair)}
        require_same_settings(project, {**known, **settings})
    if arguments.init_from is not None:
        kind = type(outline(lambda: build(model))).__name__
        describe_start(arguments.init_from, {"class": kind, **model.to_dict()}, resume=arguments.resume)
    dataset = open_new_images(
        project,
        data,
        size,
        model.in_channels,
        skip_broken=settings["skip_broken"],
        draft=settings["draft"],
        quiet=arguments.quiet,
    )
    return _Stage1(project, dataset, model, config, settings, augment, data, taken)


def extract(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    project = Project(arguments.run)
    model = project.load_vqvae(device)
    augment = augmentation(project.read_data())
    for name in ("copies", "batch_size"):
        require_positive_int(name, getattr(arguments, name))
    if arguments.workers is not None:
        require_positive_int("num_workers", arguments.workers, minimum=0)
    require_cache_place(arguments, arguments.data or project.read_data()["data"])
    if shard is not None and (project.codes / DESCRIPTION).is_file():
        raise FileConflictError(f"--shard: {project.codes} holds codes already; move it elsewhere to extract anew")
    if arguments.copies > 1 and augment is None:
        raise ArgumentError(
            f"--copies: {arguments.copies} copies would all be the same; train-vqvae had neither --flip nor --shift"
        )
    dataset = open_project_images(
        project,
        arguments.data,
        skip_broken=arguments.skip_broken,
        changed=arguments.changed_data,
        adopt=True,
        quiet=arguments.quiet,
    )
    description = project.read_data()
    training, validation = split_images(project, description, dataset)
    parts = [(training, project.codes, arguments.copies)]
    if len(validation):
        # First, so that where all parts of the training codes are there all of these are.
        parts.insert(0, (validation, project.validation_codes, 1))
    remember(dataset)
    advise(dataset, f"with --skip-broken --changed-data, after moving {project.codes.parent} elsewhere")
    keep_images(arguments, project, dataset)
    threads = loading_threads(arguments, device, dataset)
    for indices, folder, copies in parts:
        settings: dict[str, Any] = {
            "batch_size": arguments.batch_size,
            "augment": augment if copies > 1 else None,
            "copies": copies,
            "seed": description["seed"],
            "num_workers": threads,
            "progress": not arguments.quiet,
        }
        if shard is None:
            extract_codes(model, dataset, indices, folder, **settings)
            print(f"codes of {len(indices)} images x {copies} in {folder}")
        else:
            path = extract_shard(model, dataset, indices, shard, project.code_parts / folder.name, **settings)
            print(f"part {shard} of the codes of {len(indices)} images x {copies} in {path}")
    if shard is not None:
        print(f"next, once all parts are there: fastvq merge {arguments.run}")
        return
    say_use_of_codes(project, whole=True)
    say_next_priors(arguments.run, model.num_levels)


def train_prior(arguments: argparse.Namespace) -> None:
    with join() as group:
        arguments.quiet |= not group.first
        with group.together():
            project, codes, held_out, fitted, config, vqvae, codebooks, taken = _prepare_prior(arguments)
            run = project.prior(arguments.level)
            start = Start(
                run=run,
                model=fitted,
                config=config,
                data=of_codes(codes, arguments.level, 0 if held_out is None else len(held_out)),
                rows=len(codes),
                preset=preset_name(arguments, run),
                taken=taken,
                processes=group.size,
            )
            if not announce(arguments, start):
                return
        train_prior_on_codes(
            project.codes,
            arguments.level,
            fitted,
            config,
            run,
            validation_folder=None if held_out is None else held_out.folder,
            resume=arguments.resume,
            init_from=arguments.init_from,
            notes=notes(arguments),
            progress=shown(arguments),
            sample_images=None if vqvae is None else preview_of(vqvae, held_out or codes, arguments.level),
            codebooks=codebooks,
        )
        if group.first:
            print(f"prior in {run / 'model'}")
            elsewhere = made_elsewhere(project.path)
            then = how_to_sample_elsewhere(project.path) if elsewhere else f"fastvq sample --checkpoint {project.path}"
            print(f"once all levels have one: {then}")


class _Stage2(NamedTuple):
    """What ``train-prior`` has made of its options; without an autoencoder there are no pictures."""

    project: Project
    codes: CodeDataset
    held_out: CodeDataset | None
    fitted: PriorConfig
    config: TrainConfig
    vqvae: HierarchicalVQVAE | None
    codebooks: tuple[Tensor, ...] | None
    taken: dict[str, Any]


def _prepare_prior(arguments: argparse.Namespace) -> _Stage2:
    device = choose_device(arguments.device)
    project = Project(arguments.run)
    codes = CodeDataset(project.codes)
    if not 0 <= arguments.level < codes.num_levels:
        raise ArgumentError(f"--level: {project.codes} holds levels 0..{codes.num_levels - 1}, got {arguments.level}")
    run = project.prior(arguments.level)
    taken = follow_recipe(arguments, preset_for_codes(project.vqvae, arguments.level))
    template = model_config(arguments, run, PriorConfig)
    classes = template.num_classes is not None if arguments.resume else not arguments.unconditional
    if classes and arguments.unconditional:
        raise FileConflictError(f"--unconditional: the prior in {run} was started with classes")
    fitted = fit_to_codes(template, codes, arguments.level, codes.num_classes if classes else None)
    config = train_config(arguments, run, device)
    vqvae = project.load_vqvae(device) if project.vqvae.is_dir() else None
    if vqvae is not None:
        project.require_same_autoencoder(codes.model, vqvae, project.codes)
    known = project.read_data()["class_names"] if project.data.is_file() else list(codes.class_names)
    if known != list(codes.class_names):
        raise FileConflictError(
            f"--run: the codes in {project.codes} are of the classes {', '.join(codes.class_names) or 'none'}, the "
            f"project knows {', '.join(known) or 'none'}; move {project.codes.parent} elsewhere and extract again"
        )
    held_out = CodeDataset(project.validation_codes) if project.validation_codes.is_dir() else None
    codebooks = _codebooks_to_start_from(arguments, run, vqvae)
    return _Stage2(project, codes, held_out, fitted, config, vqvae, codebooks, taken)


def _codebooks_to_start_from(
    arguments: argparse.Namespace, run: Path, vqvae: HierarchicalVQVAE | None
) -> tuple[Tensor, ...] | None:
    """What ``--code-init`` says; of a run that goes on, what its record says."""
    typed = arguments.code_init
    record = recorded(arguments, run)
    if record is not None:
        there = code_init(record)
        if typed not in (None, there):
            raise FileConflictError(f"--code-init: the prior in {run} was started with {there}, got {typed}")
        typed = there
    if arguments.init_from is not None:
        if typed == "codebooks" and not arguments.resume:
            raise ArgumentError("--code-init: codebooks cannot be with --init-from, whose weights are the first ones")
        return None
    if typed == "random":
        return None
    if vqvae is None:
        if typed is None:
            return None
        raise ArgumentError(f"--code-init: codebooks are those of an autoencoder, and {arguments.run} has none")
    return vqvae.codebooks


def fit_to_codes(template: PriorConfig, codes: CodeDataset, level: int, num_classes: int | None) -> PriorConfig:
    """The architecture of ``template`` for the grids, codebooks and classes of a level of ``codes``."""
    return dataclasses.replace(
        template,
        level=level,
        shape=codes.shapes[level],
        num_codes=codes.num_codes[level],
        num_classes=num_classes,
        condition_shapes=tuple(codes.shapes[:level]),
        condition_num_codes=tuple(codes.num_codes[:level]),
    )


def preview_of(vqvae: HierarchicalVQVAE, codes: CodeDataset, level: int) -> Callable[[Prior, int], Picture]:
    """Pictures of a prior in training: its samples under real codes of the levels above, finer levels left out.

    Each column is of one class, whose name is below it, as far as classes are known and count for something.
    """
    rows, columns = _rows_by_class(codes)
    above = tuple(codes.codes(upper, rows) for upper in range(level))

    def draw(prior: Prior, step: int) -> Picture:
        label = codes.labels[rows] if prior.config.num_classes and codes.labels is not None else None
        drawn = sample(prior, len(rows), condition=above, label=label, seed=0)
        images = vqvae.preview([*(upper.to(drawn.device) for upper in above), drawn])
        if codes.labels is None or (label is None and not above):
            return Picture("samples", images)
        captions = [codes.class_names[int(one)] for one in codes.labels[rows[:columns]]]
        return Picture("samples", images, columns, captions)

    return draw


def _rows_by_class(codes: CodeDataset) -> tuple[Tensor, int]:
    """Rows of codes for a grid of pictures, row by row, and its columns: one for each class, or for some of many."""
    if codes.labels is None:
        return torch.from_numpy(spread_over_classes(None, len(codes), _PICTURES)), min(_PICTURES, len(codes))
    shown = codes.labels[spread_over_classes(codes.labels, len(codes), _COLUMNS)].unique()
    each = torch.arange(max(1, round(_PICTURES / len(shown))))
    members = [(codes.labels == one).nonzero().flatten() for one in shown]
    return torch.stack([found[each * len(found) // len(each)] for found in members], 1).flatten(), len(shown)
