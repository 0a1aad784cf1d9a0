"""A folder of image files as a data set."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import PIL
import torch
from torch import Tensor

from fastvq._bar import bar
from fastvq._check import require_bool, require_choice, require_positive_int
from fastvq.data.base import require_size
from fastvq.data.known import DECODED, OPENED, SEVERAL, read_known, write_known
from fastvq.data.pictures import PictureRules, check_picture, formats_of, picture_types, read_picture
from fastvq.data.pixels import StoredPixels, store_pixels, stored_pixels
from fastvq.data.search import EMPTY, HIDDEN, TYPE, Search
from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, FastvqError, MissingFileError

T = TypeVar("T")
R = TypeVar("R")

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
_LISTED = 20
_NAMED = 3
_THREADS = 8
# Files that a thread looks at in one go.
_CHUNK = 64
_COMPARED = 16
_DAMAGE_NOTE = 'Its header was in order, and no more was checked; check="decode" with skip_broken=True leaves it out.'
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
        check: ``decode`` reads every image once now; ``header`` only its format, size and frames, and whether a JPEG,
            PNG, GIF or WebP file is cut off, so that other damage is found when the image is used.
        cache: keep all images decoded in memory (C * H * W bytes each); needs ``check="decode"``.
        suffixes: endings of image files, such as ``.png``, in any case; by default those of all still pictures that
            Pillow opens here.
        exclude: folders below ``root`` to leave out.
        empty_classes: ``refuse`` class folders that hold no image, because leaving them out moves the labels after
            them; or ``leave out``.
        known: a file with what earlier checks found out. Files whose path below ``root``, size and time of modification
            are as they were then are not looked at again. :meth:`remember` writes it.
        draft: decode JPEG files of at least 4 times ``size`` at a half, a quarter or an eighth of their own size first,
            which is several times faster; pixels differ by a few of 255 levels.
        progress: show a progress bar on stderr during the check.

    Attributes:
        paths: the images' files.
        labels, class_names, channels, size: see :class:`ImageDataset`.
        skipped: (path, reason) of the images left out because they cannot be read.
        left_out: (path, reason) of what is not taken for an image.
        suffixes: endings of the files that count.
        damage_note: what to say beside the error where the damage of a file shows that had only its header checked.

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
        known: str | os.PathLike[str] | None = None,
        draft: bool = False,
        progress: bool = False,
    ) -> None:
        self.size = require_size("size", size)
        if channels not in (1, 3):
            raise ArgumentError(f"channels: expected 1 or 3, got {channels!r}")
        self.channels = channels
        require_bool("draft", draft)
        self.draft = draft
        self.damage_note = _DAMAGE_NOTE
        require_choice("check", check, ("decode", "header"))
        if cache and check != "decode":
            raise ArgumentError('cache: needs check="decode", which is what fills the cache')
        require_choice("empty_classes", empty_classes, ("refuse", "leave out"))
        self.suffixes = tuple(picture_types()) if suffixes is None else _require_suffixes(suffixes)
        self._rules = PictureRules(formats_of(self.suffixes), require_positive_int("max_pixels", max_pixels))
        self.root = Path(root)
        if not self.root.exists():
            raise MissingFileError(f"root: {self.root} does not exist")
        if not self.root.is_dir():
            raise MissingFileError(f"root: {self.root} is a file, expected a folder of images")
        search = Search(self.suffixes, exclude)
        found = sorted(search.images(self.root))
        self.left_out = sorted(search.left_out)
        if not found:
            aside = f" (left out: {self._left_out_text()})" if self.left_out else ""
            raise MissingFileError(f"root: no image in {self.root} or its sub-folders{aside}")
        names = self._class_folders(found, search.first_level, empty_classes)
        if self.left_out:
            warnings.warn(f"left out of {self.root}: {self._left_out_text()}", ImageFolderWarning, stacklevel=2)

        self._pixels: np.ndarray | StoredPixels | None = None
        if cache:
            self._pixels = np.empty((len(found), *self.size, channels), dtype=np.uint8)
        sizes, times = self._sizes_and_times(found)
        self._known = None if known is None else Path(known)
        before = np.zeros(len(found), np.uint8)
        if self._known is not None and not cache:
            before = read_known(self._known, self._described(), found, sizes, times)
        reasons, flags = self._check(found, before, check, progress)
        self._findings = None if np.array_equal(flags, before) else (found, sizes, times, flags)
        bad = [(self.root / name, reason) for name, reason in zip(found, reasons, strict=True) if reason is not None]
        good = np.array([index for index, reason in enumerate(reasons) if reason is None], np.int64)
        if bad and (not skip_broken or not len(good)):
            outcome = "nothing else is left" if skip_broken else "skip_broken=True goes on without them"
            raise CorruptFileError(_report(bad, len(found), outcome))
        if bad:
            warnings.warn(_report(bad, len(found), "going on without them"), ImageFolderWarning, stacklevel=2)
        several = [found[index] for index in np.flatnonzero(flags & SEVERAL)]
        if several:
            text = f"{len(several)} files hold several frames, of which the first is read: {_some(several)}"
            warnings.warn(text, ImageFolderWarning, stacklevel=2)
        self.skipped = bad
        self._names = [found[index] for index in good] if bad else found
        self._decoded = flags[good] & DECODED > 0
        self._times = times[good]
        self.files: Mapping[str, int] = dict(zip(self._names, sizes[good].tolist(), strict=True))
        if bad and isinstance(self._pixels, np.ndarray):
            self._pixels = self._pixels[good]
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers[name.partition("/")[0]] for name in self._names] if names else []
        # Class names come from all files found, so that they do not depend on which ones are broken.
        self.class_names = names
        self.labels = torch.tensor(labels, dtype=torch.int64) if names else None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _described(self) -> dict[str, str]:
        """What the findings of a check depend on beside the files."""
        rules = self._rules
        return {"pillow": PIL.__version__, "formats": " ".join(rules.formats), "max_pixels": str(rules.limit)}

    def _sizes_and_times(self, files: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes, and nanoseconds of the last modification: int64 [N]; -1 where there is no file, as the check says."""

        def look(name: str) -> tuple[int, int]:
            try:
                status = os.stat(f"{self.root}{os.sep}{name}")
            except OSError:
                return -1, -1
            return status.st_size, status.st_mtime_ns

        pairs = np.array(_in_threads(look, files), np.int64).reshape(-1, 2)
        return pairs[:, 0].copy(), pairs[:, 1].copy()

    def _check(
        self, files: list[str], known: np.ndarray, check: str, progress: bool
    ) -> tuple[list[str | None], np.ndarray]:
        """Why each file cannot be read, or None, and the flags of all of them, given those that are known."""
        reasons: list[str | None] = [None] * len(files)
        flags = known.copy()
        wanted = DECODED if check == "decode" else OPENED

        def look(index: int) -> None:
            path = self.root / files[index]
            try:
                if check == "header":
                    more = check_picture(path, self._rules)
                else:
                    pixels, more = self._read(path)
                    if isinstance(self._pixels, np.ndarray):
                        self._pixels[index] = pixels
            except CorruptFileError as error:
                reasons[index] = str(error).removeprefix(f"{path}: ")
                flags[index] = 0
            else:
                flags[index] = wanted | OPENED | (SEVERAL if more else 0)

        new = np.flatnonzero(known & wanted == 0).tolist()
        _in_threads(look, new, "checking images" if progress and new else None)
        return reasons, flags

    def remember(self) -> None:
        """Write what the check found out to ``known``, for the next one. Nothing depends on whether that works."""
        if self._known is not None and self._findings is not None:
            with contextlib.suppress(OSError, FastvqError):
                write_known(self._known, self._described(), *self._findings)
                self._findings = None

    def _class_folders(self, found: list[str], first_level: list[Path], empty_classes: str) -> tuple[str, ...]:
        """Names of the classes; empty if images lie in the root itself."""
        loose = sum("/" not in name for name in found)
        if loose:
            if loose < len(found):
                warnings.warn(
                    f"{loose} of {len(found)} images lie directly in {self.root}, so there are no labels",
                    ImageFolderWarning,
                    stacklevel=3,
                )
            return ()
        names = {name.partition("/")[0] for name in found}
        empty = sorted(folder for folder in first_level if folder.name not in names)
        if empty and empty_classes == "refuse":
            aside = f" (left out: {self._left_out_text()})" if self.left_out else ""
            raise MissingFileError(
                f"root: no image in {_some([folder.name for folder in empty])} of {self.root}, whose sub-folders are "
                f"the classes{aside}. Leaving a class out would move the labels after it: add its images, or move the "
                "folder elsewhere."
            )
        self.left_out = sorted([*self.left_out, *((folder, EMPTY) for folder in empty)])
        return tuple(sorted(names))

    def _left_out_text(self) -> str:
        """What was left out: counts by reason, and the first names."""
        types: dict[str, list[str]] = defaultdict(list)
        folders: dict[str, list[str]] = defaultdict(list)
        hidden, other = 0, Counter[str]()
        for path, reason in self.left_out:
            suffix = path.suffix.lower()
            if reason == HIDDEN:
                hidden += 1
            elif reason != TYPE:
                folders[reason].append(self._name(path))
            elif suffix in _NO_PICTURES:
                other[suffix or "no ending"] += 1
            else:
                types[suffix].append(self._name(path))
        texts = [f"{len(names)} {suffix} ({_some(names)}), {TYPE}" for suffix, names in types.items()]
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
        return len(self._names)

    @functools.cached_property
    def paths(self) -> list[Path]:
        """The images' files, in the order of their indices."""
        return [self.root / name for name in self._names]

    def image(self, index: int) -> Tensor:
        """Image number ``index``: float32 [C, H, W] in [-1, 1].

        Raises:
            CorruptFileError: the file cannot be read (any more).
        """
        pixels = self._fresh(index) if self._pixels is None else self._pixels[index]
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()

    def _fresh(self, index: int) -> np.ndarray:
        try:
            return self._read(self.root / self._names[index])[0]
        except CorruptFileError as error:
            if not self._decoded[index]:
                error.add_note(self.damage_note)
            raise

    @property
    def decodes(self) -> bool:
        """Whether an image is decoded from its file when it is asked for."""
        return self._pixels is None

    def pixels_folder(self, folder: str | os.PathLike[str]) -> Path:
        """Where in ``folder`` :meth:`keep_pixels` stores these images at this size."""
        return Path(folder) / f"pixels-{self._identity()['files'][:16]}"

    @property
    def pixels_bytes(self) -> int:
        """Bytes that all images take decoded."""
        return math.prod(self._shape())

    def keep_pixels(
        self, folder: str | os.PathLike[str], *, progress: bool = False, every: Callable[[], object] = lambda: None
    ) -> None:
        """Store all images, decoded and resized, in a sub-folder, or find them there, and take them from there.

        Interrupted, the next call goes on after the last image that reached the disk.

        Args:
            every: called every few seconds in between.

        Raises:
            CorruptFileError: an image cannot be read.
            DiskFullError: there is no room for all of them; found out before any is read.
            FileConflictError: another process is at it.
        """
        if self.use_pixels(folder):
            return
        with bar("storing images", show=progress, total=len(self)) as shown:

            def done(rows: int) -> None:
                shown.update(rows)
                every()

            place = self.pixels_folder(folder)
            self._pixels = store_pixels(place, self._shape(), self._identity(), self._fresh, done=done)

    def use_pixels(self, folder: str | os.PathLike[str]) -> bool:
        """Take the images from where :meth:`keep_pixels` stored them; False if they are not there, or others are."""
        found = stored_pixels(self.pixels_folder(folder), self._shape(), self._identity())
        # Times do not tell files apart that were unpacked with the same one.
        spread = {len(self) * place // _COMPARED for place in range(_COMPARED)}
        if found is None or any(not np.array_equal(found[index], self._fresh(index)) for index in spread):
            return False
        self._pixels = found
        return True

    def _shape(self) -> tuple[int, int, int, int]:
        return len(self), *self.size, self.channels

    def _identity(self) -> dict[str, Any]:
        """Of the images as they lie now, more strictly than :meth:`fingerprint`, and the version that decodes them."""
        digest = hashlib.sha256(f"{self.fingerprint()} {PIL.__version__}".encode())
        digest.update(self._times.tobytes())
        return {"files": digest.hexdigest(), "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Hash of the relative paths, the files' sizes in bytes and the settings (not of the pixels: that is slow)."""
        digest = hashlib.sha256()
        for name, size in self.files.items():
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        draft = "-draft" if self.draft else ""
        return f"folder-{self.channels}x{self.size[0]}x{self.size[1]}{draft}-{len(self)}-{digest.hexdigest()}"

    def _read(self, path: Path) -> tuple[np.ndarray, bool]:
        return read_picture(path, self.size, self.channels, self._rules, draft=self.draft)


def _in_threads(look: Callable[[T], R], items: Sequence[T], title: str | None = None) -> list[R]:
    """Results for all items; with a progress bar of that title on stderr."""

    def some(start: int) -> list[R]:
        return [look(item) for item in items[start : start + _CHUNK]]

    found: list[R] = []
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        bar(title or "", show=title is not None, total=len(items)) as shown,
    ):
        for part in pool.map(some, range(0, len(items), _CHUNK)):
            found += part
            shown.update(len(part))
    return found


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
