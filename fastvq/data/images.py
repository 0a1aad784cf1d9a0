"""A folder of image files as a data set."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastvq._check import require_choice, require_positive_int
from fastvq.data.base import require_size
from fastvq.data.pictures import formats_of, picture_types, read_picture
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, MissingFileError

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
_LISTED = 20
_NAMED = 3
_THREADS = 8
# Why a name is left out.
_HIDDEN, _WRITTEN, _EXCLUDED, _TYPE, _EMPTY = (
    "a hidden name",
    "a folder that fastvq wrote",
    "excluded",
    "not a type of picture that is read",
    "a class folder without an image",
)
# Files that nobody takes for pictures are counted without naming them.
_NO_PICTURES = frozenset(
    {"", ".cfg", ".csv", ".db", ".html", ".ini", ".json", ".jsonl", ".lock", ".log", ".md", ".npy", ".npz", ".pkl"}
    | {".py", ".safetensors", ".sh", ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip"}
)


class ImageFolderWarning(UserWarning):
    """Something in a folder of images is left out or read in part."""


class ImageFolder:
    """All images below a folder, resized and cropped to one size.

    The folder is searched recursively, in sorted order, for files whose ending is one of ``suffixes``. What is left out
    (other files, names that begin with a dot, folders of runs, samples and reports that fastvq wrote) is listed in
    ``left_out`` and summed up in one warning. If every image lies in a sub-folder, the first-level sub-folders' names
    are the class names. Each image is turned upright (EXIF), cropped at the centre to the aspect of ``size`` and
    resized (bicubic, antialiased). Transparent pixels become white, 16-bit images are scaled to 8 bits, of several
    frames or pages the first counts (a warning says where). Damaged or large metadata decide nothing: without a
    readable EXIF an image stays as it lies.

    Args:
        root: the folder.
        size: an int for a square, or (H, W).
        channels: 3 (RGB) or 1 (grey).
        skip_broken: go on without images that cannot be read; they are listed in ``skipped`` and in one warning.
        max_pixels: largest width * height of a file. Pillow's own limit holds besides.
        check: ``decode`` reads every image once now, ``header`` only its size and format, so that damage further into
            a file is found when the image is used.
        cache: keep all images decoded in memory (C * H * W bytes each); needs ``check="decode"``.
        suffixes: endings of image files, such as ``.png``, in any case; by default those of all still pictures that
            Pillow opens here.
        exclude: folders below ``root`` to leave out.
        empty_classes: ``refuse`` class folders that hold no image, because leaving them out moves the labels after
            them; or ``leave out``.
        progress: show a progress bar on stderr during the check.

    Attributes:
        paths: the images' files. labels, class_names, channels, size: see :class:`ImageDataset`.
        skipped: (path, reason) of the images left out because they cannot be read.
        left_out: (path, reason) of what is not taken for an image.
        suffixes: endings of the files that count.

    Raises:
        MissingFileError: ``root`` is not a folder, or it or a class folder holds no image.
        CorruptFileError: some images cannot be read and ``skip_broken`` is False, or none can.
    """

    labels: Tensor | None

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | tuple[int, int],
        *,
        channels: int = 3,
        skip_broken: bool = False,
        max_pixels: int = MAX_PIXELS,
        check: Literal["decode", "header"] = "decode",
        cache: bool = False,
        suffixes: Sequence[str] | None = None,
        exclude: Sequence[str | os.PathLike[str]] = (),
        empty_classes: Literal["refuse", "leave out"] = "refuse",
        progress: bool = False,
    ) -> None:
        self.size = require_size("size", size)
        if channels not in (1, 3):
            raise ArgumentError(f"channels: expected 1 or 3, got {channels!r}")
        self.channels = channels
        self._max_pixels = require_positive_int("max_pixels", max_pixels)
        require_choice("check", check, ("decode", "header"))
        if cache and check != "decode":
            raise ArgumentError('cache: needs check="decode", which is what fills the cache')
        require_choice("empty_classes", empty_classes, ("refuse", "leave out"))
        self.suffixes = tuple(picture_types()) if suffixes is None else _require_suffixes(suffixes)
        self._formats = formats_of(self.suffixes)
        self.root = Path(root)
        if not self.root.exists():
            raise MissingFileError(f"root: {self.root} does not exist")
        if not self.root.is_dir():
            raise MissingFileError(f"root: {self.root} is a file, expected a folder of images")
        search = _Search(self.suffixes, exclude)
        found = sorted(search.images(self.root, ()), key=self._name)
        self.left_out = sorted(search.left_out)
        if not found:
            aside = f" (left out: {self._left_out_text()})" if self.left_out else ""
            raise MissingFileError(f"root: no image in {self.root} or its sub-folders{aside}")
        names = self._class_folders(found, search.first_level, empty_classes)
        if self.left_out:
            warnings.warn(f"left out of {self.root}: {self._left_out_text()}", ImageFolderWarning, stacklevel=2)

        self._cache = np.empty((len(found), *self.size, channels), dtype=np.uint8) if cache else None
        reasons, several = self._check_all(found, check, progress)
        bad = [(path, reason) for path, reason in zip(found, reasons, strict=True) if reason is not None]
        good = [index for index, reason in enumerate(reasons) if reason is None]
        if bad and (not skip_broken or not good):
            outcome = "nothing else is left" if skip_broken else "skip_broken=True goes on without them"
            raise CorruptFileError(_report(bad, len(found), outcome))
        if bad:
            warnings.warn(_report(bad, len(found), "going on without them"), ImageFolderWarning, stacklevel=2)
        if several:
            which = _some([self._name(path) for path in several])
            text = f"{len(several)} files hold several frames, of which the first is read: {which}"
            warnings.warn(text, ImageFolderWarning, stacklevel=2)
        self.skipped = bad
        self.paths = [found[index] for index in good]
        if self._cache is not None and bad:
            self._cache = self._cache[good]
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers[self._name(path).split("/")[0]] for path in self.paths] if names else []
        # Class names come from all files found, so that they do not depend on which ones are broken.
        self.class_names = names
        self.labels = torch.tensor(labels, dtype=torch.int64) if names else None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _check_all(self, paths: list[Path], check: str, progress: bool) -> tuple[list[str | None], list[Path]]:
        """Why each file cannot be read, or None; and the files of several frames."""
        from tqdm import tqdm

        several = []

        def reason(job: tuple[int, Path]) -> str | None:
            index, path = job
            try:
                pixels, more = self._read(path, decode=check == "decode")
            except CorruptFileError as error:
                return str(error).removeprefix(f"{path}: ")
            if self._cache is not None:
                self._cache[index] = pixels
            if more:
                several.append(path)
            return None

        with ThreadPoolExecutor(_THREADS) as pool:
            reasons = pool.map(reason, enumerate(paths))
            bar = tqdm(reasons, "checking images", len(paths), disable=not progress, file=sys.stderr)
            return list(bar), sorted(several)

    def _class_folders(self, found: list[Path], first_level: list[Path], empty_classes: str) -> tuple[str, ...]:
        """Names of the classes; empty if images lie in the root itself."""
        parts = [self._name(path).split("/") for path in found]
        loose = sum(len(p) == 1 for p in parts)
        if loose:
            if loose < len(parts):
                warnings.warn(
                    f"{loose} of {len(parts)} images lie directly in {self.root}, so there are no labels",
                    ImageFolderWarning,
                    stacklevel=3,
                )
            return ()
        names = {p[0] for p in parts}
        empty = sorted(folder for folder in first_level if folder.name not in names)
        if empty and empty_classes == "refuse":
            aside = f" (left out: {self._left_out_text()})" if self.left_out else ""
            raise MissingFileError(
                f"root: no image in {_some([folder.name for folder in empty])} of {self.root}, whose sub-folders are "
                f"the classes{aside}. Leaving a class out would move the labels after it: add its images, or move the "
                "folder elsewhere."
            )
        self.left_out = sorted([*self.left_out, *((folder, _EMPTY) for folder in empty)])
        return tuple(sorted(names))

    def _left_out_text(self) -> str:
        """What was left out: counts by reason, and the first names."""
        types: dict[str, list[str]] = defaultdict(list)
        folders: dict[str, list[str]] = defaultdict(list)
        hidden, other = 0, Counter[str]()
        for path, reason in self.left_out:
            suffix = path.suffix.lower()
            if reason == _HIDDEN:
                hidden += 1
            elif reason != _TYPE:
                folders[reason].append(self._name(path))
            elif suffix in _NO_PICTURES:
                other[suffix or "no ending"] += 1
            else:
                types[suffix].append(self._name(path))
        texts = [f"{len(names)} {suffix} ({_some(names)}), {_TYPE}" for suffix, names in types.items()]
        texts += [f"{_some(names)}, {reason}" for reason, names in folders.items()]
        if hidden:
            texts.append(f"{hidden} hidden")
        if other:
            texts.append(f"{sum(other.values())} other files ({', '.join(other)})")
        return "; ".join(texts)

    @property
    def num_classes(self) -> int | None:
        """Number of sub-folders that serve as labels, or None."""
        return None if self.labels is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """float32 [C, H, W] in [-1, 1].

        Raises:
            CorruptFileError: the file cannot be read (any more).
        """
        pixels = self._read(self.paths[index])[0] if self._cache is None else self._cache[index]
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()

    @functools.cached_property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of each image's file, by its path below ``root``, in the order of the images."""
        return {self._name(path): path.stat().st_size for path in self.paths}

    def fingerprint(self) -> str:
        """Hash of the relative paths, the files' sizes in bytes and the settings (not of the pixels: that is slow)."""
        digest = hashlib.sha256()
        for name, size in self.files.items():
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        return f"folder-{self.channels}x{self.size[0]}x{self.size[1]}-{len(self)}-{digest.hexdigest()}"

    def _read(self, path: Path, *, decode: bool = True) -> tuple[np.ndarray, bool]:
        limit = self._max_pixels
        return read_picture(path, self.size, self.channels, limit=limit, formats=self._formats, decode=decode)


class _Search:
    """The image files below a folder, and what else lies there."""

    def __init__(self, suffixes: tuple[str, ...], exclude: Sequence[str | os.PathLike[str]]) -> None:
        self.left_out: list[tuple[Path, str]] = []
        self.first_level: list[Path] = []
        self._suffixes = suffixes
        self._exclude = [_identity(Path(path)) for path in exclude if Path(path).is_dir()]

    def images(self, folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        """``above`` identifies the folders on the way here, so that links form no loop."""
        try:
            here = (*above, _identity(folder))
            entries = list(os.scandir(folder))
        except OSError as error:
            raise MissingFileError(f"root: cannot read the folder {folder} ({error.strerror})") from error
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                self.left_out.append((path, _HIDDEN))
            elif entry.is_dir():
                if _identity(path) in here:
                    continue
                reason = self._reason(path)
                if reason is not None:
                    self.left_out.append((path, reason))
                    continue
                if not above:
                    self.first_level.append(path)
                yield from self.images(path, here)
            elif entry.name.lower().endswith(self._suffixes):
                yield path
            else:
                self.left_out.append((path, _TYPE))

    def _reason(self, folder: Path) -> str | None:
        """Why a folder is left out, or None."""
        try:
            if _identity(folder) in self._exclude:
                return _EXCLUDED
            names = set(os.listdir(folder))
        except OSError as error:
            raise MissingFileError(f"root: cannot read the folder {folder} ({error.strerror})") from error
        written = (
            {"data.json", "vqvae"} <= names  # a project
            or ("config.json" in names and not names.isdisjoint({"checkpoints", "logs", "model.safetensors"}))
            or "pipeline.json" in names
            or {"samples.json", "codes.safetensors"} <= names
            or {"evaluation.json", "README.md"} <= names
        )
        return _WRITTEN if written else None


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _require_suffixes(suffixes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(suffixes, str) or not all(isinstance(suffix, str) for suffix in suffixes):
        raise ArgumentTypeError(f"suffixes: expected a list of endings such as '.png', got {suffixes!r}")
    if not suffixes or not all(suffix.startswith(".") for suffix in suffixes):
        raise ArgumentError(f"suffixes: expected endings such as '.png', got {suffixes!r}")
    return tuple(suffix.lower() for suffix in suffixes)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _report(bad: list[tuple[Path, str]], total: int, outcome: str) -> str:
    lines = [f"  {path}: {reason}" for path, reason in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  ... and {len(bad) - _LISTED} more")
    return "\n".join([f"{len(bad)} of {total} images cannot be read; {outcome}:", *lines])
