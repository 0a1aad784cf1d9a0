"""The images of a command: opened as --data says, and compared with those that a project was started with."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastvq._check import require_positive_int
from fastvq._files import read_json
from fastvq._schema import TEXT, integer, named, optional, require_entries, several
from fastvq.cli.project import Project
from fastvq.data import Digits, ImageDataset, ImageFolder, split_indices
from fastvq.data.images import ImageFolderWarning
from fastvq.errors import ArgumentError, FileConflictError, MissingFileError

DIGITS = "digits"
# What counted as an image before projects recorded it.
_FIRST_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_NAMED = 3
_FILES = {"fingerprint": TEXT, "held_out": optional(several(TEXT)), "files": named(integer())}


def image_size(sides: Sequence[int]) -> tuple[int, int]:
    """(H, W) of what ``--size`` was given."""
    if len(sides) > 2:
        raise ArgumentError(f"--size: expected one side, or height and width, got {len(sides)} numbers")
    return sides[0], sides[-1]


def require_shift(shift: int, size: tuple[int, int]) -> None:
    """Images must not be shifted out of sight."""
    require_positive_int("max_shift", shift, minimum=0)
    if shift >= min(size):
        raise ArgumentError(f"--shift: {shift} is not smaller than the image, {size[0]} x {size[1]}")


def open_data(
    data: str,
    size: Sequence[int] | None,
    channels: int,
    *,
    skip_broken: bool = False,
    suffixes: Sequence[str] | None = None,
    exclude: Sequence[Path] = (),
    leave_out_empty: bool = False,
    draft: bool = False,
    known: Path | None = None,
    quiet: bool = False,
) -> ImageDataset:
    """The data set that ``--data`` names; what it warns of is printed as a line of its own.

    Of a folder's files the headers are checked; all of each only where damaged ones are to be left out.

    Args:
        draft, known: see :class:`ImageFolder`.
        leave_out_empty: class folders without an image are left out instead of refused.
    """
    pair = None if size is None else image_size(size)
    if data == DIGITS:
        if channels != 1:
            raise ArgumentError(f"--data: the digits have 1 channel, the model takes {channels}")
        return Digits(pair or 32)
    if pair is None:
        raise ArgumentError("--size: images from a folder need a size")
    with _warnings_as_lines():
        return ImageFolder(
            data,
            pair,
            channels=channels,
            skip_broken=skip_broken,
            check="decode" if skip_broken else "header",
            suffixes=suffixes,
            exclude=exclude,
            empty_classes="leave out" if leave_out_empty else "refuse",
            known=known,
            draft=draft,
            progress=not quiet,
        )


def known_files(project: Project) -> Path:
    """Where a project keeps what is known of its images' files."""
    return project.cache / "files"


def open_new_images(
    project: Project,
    data: str,
    size: Sequence[int] | None,
    channels: int,
    *,
    skip_broken: bool,
    draft: bool,
    quiet: bool,
) -> ImageDataset:
    """The images that a run of stage 1 starts with, or goes on with."""
    there = data != DIGITS and project.path.is_dir() and Path(data).is_dir()
    if there and not project.started and project.path.samefile(data):
        raise ArgumentError(f"--run: {project.path} is the folder of images itself; choose another, in it or not")
    recorded = project.read_data() if project.started else None
    return open_data(
        data,
        size,
        channels,
        skip_broken=skip_broken,
        suffixes=None if recorded is None else recorded.get("suffixes", _FIRST_SUFFIXES),
        exclude=[project.path],
        leave_out_empty=recorded is not None,
        draft=draft,
        known=known_files(project),
        quiet=quiet,
    )


def require_same_settings(project: Project, settings: dict[str, Any]) -> None:
    """A run of stage 1 that goes on must do so with the settings that the project was started with.

    Raises:
        FileConflictError: some are others; says which.
    """
    there = {"draft": False, **project.read_data()}
    changed = [
        f"{name}: {there.get(name)!r} there, {now!r} now" for name, now in settings.items() if there.get(name) != now
    ]
    if changed:
        raise FileConflictError(
            f"--run: the run in {project.vqvae} was started with other settings ({', '.join(changed)})"
        )


def start_project(project: Project, data: str, dataset: ImageDataset, settings: dict[str, Any]) -> None:
    """Record images and settings of a new run of stage 1; one that is there must have been started with the same.

    Args:
        settings: skip_broken, flip, shift, draft, validation and seed.

    Raises:
        FileConflictError: other images or settings than those of the run; says what differs.
    """
    settings = {"size": list(dataset.size), "channels": dataset.channels, **settings}
    split_indices(len(dataset), settings["validation"], settings["seed"])
    if not project.started:
        _record(project, settings, data, dataset)
        return
    require_same_settings(project, settings)
    there = project.read_data()
    trained_on = _trained_on(project)
    if not _same_images(trained_on.get("fingerprint"), dataset.fingerprint()):
        raise FileConflictError(
            f"{_difference(project, data, dataset, trained_on)}\n"
            "A run goes on with the images that it was started with; for others choose another --run."
        )
    # The project may have gone on with other images since.
    if _is_recorded(project, there, dataset):
        _remember(project, there, data, dataset)


def open_project_images(
    project: Project,
    data: str | None,
    *,
    size: Sequence[int] | None = None,
    channels: int | None = None,
    skip_broken: bool = False,
    changed: bool = False,
    adopt: bool = False,
    quiet: bool = False,
) -> ImageDataset:
    """The project's images, wherever they lie now.

    Images are the same if their fingerprint (paths below the folder, and sizes in bytes) and class names are. A project
    that recorded no fingerprint is compared by that of its autoencoder's run, and by class names alone without one.

    Args:
        data: where they lie; None: where they were.
        size, channels: other than the project's.
        skip_broken: leave out what cannot be read, even if the project did not.
        changed: take other images on purpose.
        adopt: changed images become the project's; otherwise they serve this command alone.

    Raises:
        FileConflictError: other images and not ``changed``; or what was made from the images before is in the way.
    """
    description = project.read_data()
    data = data or recorded_folder(project, description)
    dataset = open_data(
        data,
        size or description["size"],
        channels or description["channels"],
        skip_broken=skip_broken or description["skip_broken"],
        suffixes=None if changed else description.get("suffixes", _FIRST_SUFFIXES),
        exclude=[project.path],
        leave_out_empty=not changed,
        draft=description.get("draft", False),
        known=None if changed and not adopt else known_files(project),
        quiet=quiet,
    )
    if _is_recorded(project, description, dataset):
        _remember(project, description, data, dataset)
        return dataset
    recorded: dict[str, Any] = {name: description[name] for name in ("images", "fingerprint") if name in description}
    difference = _difference(project, data, dataset, {**_trained_on(project), **recorded})
    if not changed:
        raise FileConflictError(
            f"{difference}\nBring the images back, start another project for these, or take them on purpose: "
            "--changed-data."
        )
    same_classes = list(dataset.class_names) == description["class_names"]
    if adopt:
        _require_nothing_made(project, same_classes)
        if _recorded_files(project) is None:
            print("fastvq: which images were held out is not recorded; these are split anew", file=sys.stderr)
        _, held_out = split_images(project, description, dataset)
        names = list(dataset.files) if isinstance(dataset, ImageFolder) else None
        settings = {**description, "skip_broken": skip_broken or description["skip_broken"]}
        _record(project, settings, data, dataset, None if names is None else [names[index] for index in held_out])
    elif description["class_names"] and not same_classes:
        raise ArgumentError(
            f"--changed-data: labels would not mean the same, the project knows the classes "
            f"{_some(description['class_names'])} and these images {_some(dataset.class_names) or 'none'}"
        )
    print(f"fastvq: {difference}", file=sys.stderr)
    return dataset


def split_images(project: Project, description: dict[str, Any], dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Indices (training, validation) of a project's images.

    Of a changed set, images that the project knows stay on the side where they were, so that none that a model was
    trained on is held out; new ones are split by themselves.
    """
    fraction, seed = description["validation"], description["seed"]
    known = _recorded_files(project)
    if known is None or not isinstance(dataset, ImageFolder):
        return split_indices(len(dataset), fraction, seed)
    held_out = known.get("held_out")
    if held_out is None:
        if _same_images(known["fingerprint"], dataset.fingerprint()):
            return split_indices(len(dataset), fraction, seed)
        then = list(known["files"])
        held_out = [then[index] for index in split_indices(len(then), fraction, seed)[1]]
    names = list(dataset.files)
    new = [name for name in names if name not in known["files"]]
    if len(new) > 1:
        held_out = [*held_out, *(new[index] for index in split_indices(len(new), fraction, seed)[1])]
    aside = set(held_out)
    training = np.array([index for index, name in enumerate(names) if name not in aside], dtype=np.int64)
    validation = np.array([index for index, name in enumerate(names) if name in aside], dtype=np.int64)
    if not len(training):
        raise ArgumentError("--data: all of these images were held out when the autoencoder was trained")
    return training, validation


def _record(
    project: Project, settings: dict[str, Any], data: str, dataset: ImageDataset, held_out: list[str] | None = None
) -> None:
    """Write what a project knows of its images: data.json, and their names where they are files.

    Args:
        held_out: names of the validation images; None: those that fraction and seed give.
    """
    fingerprint = dataset.fingerprint()
    places = {"data": data}
    description: dict[str, Any] = {}
    if isinstance(dataset, ImageFolder):
        # A working folder is not for ever: an absolute path, and one that holds if both folders move together.
        places = {"data": os.path.abspath(data), "data_from_run": _relative(data, project.path)}
        description["suffixes"] = list(dataset.suffixes)
        project.write_files({"fingerprint": fingerprint, "held_out": held_out, "files": dict(dataset.files)})
    description |= {"class_names": list(dataset.class_names), "images": len(dataset), "fingerprint": fingerprint}
    project.write_data({**settings, **places, **description})


def _remember(project: Project, description: dict[str, Any], data: str, dataset: ImageDataset) -> None:
    """Record where the same images lie now, and what an older project has not recorded."""
    if data == DIGITS or (description["data"] == os.path.abspath(data) and "fingerprint" in description):
        return
    known = _recorded_files(project)
    # Another size of the same images must not become the project's.
    if [list(dataset.size), dataset.channels] == [description["size"], description["channels"]]:
        _record(project, description, data, dataset, None if known is None else known["held_out"])
    else:
        moved = {"data": os.path.abspath(data), "data_from_run": _relative(data, project.path)}
        project.write_data({**description, **moved})


def _relative(data: str, run: Path) -> str:
    return Path(os.path.relpath(os.path.abspath(data), os.path.abspath(run))).as_posix()


def recorded_folder(project: Project, description: dict[str, Any]) -> str:
    """Where a project's images lie, as far as it knows; as :func:`open_data` takes it.

    Raises:
        MissingFileError: they are not there.
    """
    data = str(description["data"])
    if data == DIGITS:
        return data
    places = [data]
    if "data_from_run" in description:
        places.append(os.path.normpath(project.path / description["data_from_run"]))
    for place in places:
        if os.path.isdir(place):
            return place
    raise MissingFileError(f"--data: the images of {project.path} are no longer in {data}; pass --data FOLDER")


def _recorded_files(project: Project) -> dict[str, Any] | None:
    """Names of the project's images; None where they are not recorded, or those are of other images."""
    if not project.files.is_file():
        return None
    known = read_json(project.files)
    require_entries(project.files, known, _FILES)
    return known if known["fingerprint"] == project.read_data().get("fingerprint") else None


def _trained_on(project: Project) -> dict[str, Any]:
    """What the autoencoder's run says of its images: ``fingerprint`` and ``images``; empty without a run."""
    config = project.vqvae / "config.json"
    data = read_json(config).get("data") if config.is_file() else None
    return data if isinstance(data, dict) else {}


def _is_recorded(project: Project, description: dict[str, Any], dataset: ImageDataset) -> bool:
    fingerprint = description.get("fingerprint", _trained_on(project).get("fingerprint"))
    return list(dataset.class_names) == description["class_names"] and _same_images(fingerprint, dataset.fingerprint())


def _same_images(then: str | None, now: str) -> bool:
    """Whether fingerprints are of the same images, at whatever size; True where none is known."""
    if then is None:
        return True
    kinds = [(text.partition("-")[0], text.rpartition("-")[2]) for text in (then, now)]
    return kinds[0] == kinds[1]


def _difference(project: Project, data: str, dataset: ImageDataset, expected: dict[str, Any]) -> str:
    """What tells images from those expected: numbers, classes, first names."""
    lines = [f"--data: {data} holds other images than {project.path} was trained on"]
    if expected.get("images") is not None:
        lines.append(f"  {expected['images']} images then, {len(dataset)} now")
    classes = project.read_data()["class_names"]
    sets = [
        ("classes added", [name for name in dataset.class_names if name not in classes]),
        ("classes gone", [name for name in classes if name not in dataset.class_names]),
    ]
    known = _recorded_files(project)
    if known is not None and isinstance(dataset, ImageFolder):
        then, now = known["files"], dataset.files
        sets += [
            ("images added", [name for name in now if name not in then]),
            ("images gone", [name for name in then if name not in now]),
            ("files of another size", [name for name in now if name in then and now[name] != then[name]]),
        ]
    else:
        lines.append("  (names are not compared: they were not recorded then)")
    lines += [f"  {title}: {_some(names)} ({len(names)})" for title, names in sets if names]
    return "\n".join(lines)


def _require_nothing_made(project: Project, same_classes: bool) -> None:
    """Codes and priors of other images must not serve beside those to come; nor a classifier of other classes."""
    made = [path for path in (project.codes.parent, *sorted(project.path.glob("prior*"))) if path.is_dir()]
    if not same_classes:
        configs = sorted(project.path.glob("*/config.json"))
        made += [path.parent for path in configs if read_json(path).get("stage") == "classifier"]
    if made:
        raise FileConflictError(
            f"--changed-data: made from the images before: {', '.join(map(str, made))}. Move these elsewhere, or go on "
            f"in another project, with copies of {project.vqvae.name}/, {project.data.name} and {project.files.name}."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ImageFolderWarning):
            print(f"fastvq: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    usual = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("always", ImageFolderWarning)
        yield
