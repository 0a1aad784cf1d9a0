"""How images get to a command: decoded ones kept in a file, and who loads them."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from fastvq.cli.project import Project
from fastvq.data import ImageDataset, ImageFolder
from fastvq.distributed import Group
from fastvq.errors import ArgumentError, FileConflictError, PeerError
from fastvq.training import TrainConfig
from fastvq.training.batches import suggested_workers


def require_cache_place(arguments: argparse.Namespace, data: str) -> None:
    """Find out that ``--cache-images`` names no folder for it, before opening any image."""
    place = arguments.cache_images
    if not isinstance(place, Path):
        return
    if place.exists() and not place.is_dir():
        raise FileConflictError(f"--cache-images: {place} is a file, expected a folder")
    inside = Path(data).resolve()
    if Path(data).is_dir() and inside in (place.resolve(), *place.resolve().parents):
        raise ArgumentError(f"--cache-images: {place} lies in the folder of images, {data}; choose another")


def keep_images(
    arguments: argparse.Namespace, project: Project, dataset: ImageDataset, group: Group | None = None
) -> None:
    """Take images from where they are stored decoded, and store them there first if ``--cache-images`` says so.

    The first process of a group stores them for all, which see the same folder.
    """
    if not isinstance(dataset, ImageFolder):
        return
    group = group or Group()
    wanted = getattr(arguments, "cache_images", None)
    place = wanted if isinstance(wanted, Path) else project.cache
    if wanted is not None:
        _tell(arguments, dataset, place)
        _store(dataset, place, group, progress=not arguments.quiet)
    with group.together():
        if wanted is not None:
            if dataset.decodes and not dataset.use_pixels(place):
                raise FileConflictError(f"--cache-images: process {group.rank} does not find the images in {place}")
        elif dataset.use_pixels(place):
            _tell(arguments, dataset, place)


def _store(dataset: ImageFolder, place: Path, group: Group, *, progress: bool) -> None:
    if not group.first:
        while group.agree():
            pass
        return
    try:
        # The others wait for a word every now and then, as they would give up on one that takes long.
        dataset.keep_pixels(place, progress=progress, every=lambda: group.agree(flag=1))
    except PeerError:
        raise
    except Exception as error:
        group.agree(error)
    group.agree()


def _tell(arguments: argparse.Namespace, dataset: ImageFolder, place: Path) -> None:
    if not arguments.quiet:
        size = dataset.pixels_bytes / 2**20
        print(f"fastvq: decoded images in {dataset.pixels_folder(place)}, {size:.1f} MB", file=sys.stderr)


def with_workers(
    arguments: argparse.Namespace, config: TrainConfig, dataset: ImageDataset, group: Group
) -> TrainConfig:
    """The settings with a number of loading processes, where neither the command line nor a run's record has one."""
    if arguments.workers is not None or arguments.resume:
        return config
    batch = math.ceil(config.batch_size / group.size)
    count = _suggested(config.device or "cpu", batch, dataset)
    if count and not arguments.quiet:
        print(f"fastvq: {count} processes load images (--workers)", file=sys.stderr)
    return dataclasses.replace(config, num_workers=count)


def loading_threads(arguments: argparse.Namespace, device: str, dataset: ImageDataset) -> int:
    """The threads of ``extract``."""
    if arguments.workers is not None:
        return int(arguments.workers)
    count = _suggested(device, arguments.batch_size, dataset)
    if count and not arguments.quiet:
        print(f"fastvq: {count} threads load images (--workers)", file=sys.stderr)
    return count


def _suggested(device: str, batch: int, dataset: ImageDataset) -> int:
    size = 4 * batch * dataset.channels * math.prod(dataset.size)
    return suggested_workers(device, size, decodes=isinstance(dataset, ImageFolder) and dataset.decodes)


def remember(dataset: ImageDataset) -> None:
    """Keep what was found out about the files, for the next start."""
    if isinstance(dataset, ImageFolder):
        dataset.remember()


def advise(dataset: ImageDataset, without: str) -> None:
    """Have the error of a file that proves damaged say what to do: to mend it, or how to go on ``without`` it."""
    if isinstance(dataset, ImageFolder):
        dataset.damage_note = f"Its header was in order, and no more was checked. Mend it, or leave it out: {without}."
