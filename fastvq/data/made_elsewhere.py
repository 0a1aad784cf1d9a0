"""Codes that another project made, brought into the form that priors are trained on."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastvq._files import read_json, reading, sha256
from fastvq._schema import TEXT, integer, require_entries, several
from fastvq._tensors import mapped_safetensors
from fastvq._version import __version__
from fastvq.data.codes import DESCRIPTION, FORMAT, LABELS, SOURCE, Encoded, checked_indices, level_file, write_codes
from fastvq.errors import ArgumentError, ArgumentTypeError, MissingFileError

CODES_FILE = "codes.safetensors"
# In place of the checksum of a model of this package.
ELSEWHERE = "made elsewhere"
_LARGEST = 2**31
_CHUNK = 4096  # rows at a time
_SHAPES = several(several(integer(1, _LARGEST), least=2, most=2), least=1)


def import_codes(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    indices: np.ndarray | Tensor | Sequence[int] | None = None,
) -> Path:
    """Take codes of any autoencoder from files, for :func:`fastvq.training.train_prior`; returns the new folder.

    All are read and compared with what ``codes.json`` says before anything is written. Memory does not grow with them.
    A call that was killed goes on when it is made again.

    Args:
        source: a folder with the codes of each level, top (coarsest) first, integers [N, h, w]: ``level0.npy``,
            ``level1.npy``, ..., and perhaps ``labels.npy``, integers [N]; or the tensors ``level0``, ``level1``, ...
            and ``labels`` in ``codes.safetensors``. Beside them a file ``codes.json`` with

            - ``num_codes``: size of the codebook, or a list with that of each level;
            - ``num_classes`` or ``class_names`` (a name per label), if there are labels;
            - ``shapes``: optional, a list of [h, w] of each level; codes may then be [N, h * w], by rows.
        folder: a new folder, or one that an earlier such call left, as :class:`CodeDataset` reads it.
        indices: rows to take, in their order; by default all.

    Raises:
        MissingFileError: a file is missing.
        CorruptFileError: one is damaged, or ``codes.json`` lacks something.
        ArgumentError, ArgumentTypeError: files that do not fit each other or what ``codes.json`` says.
        FileConflictError: ``folder`` holds something else.
        DiskFullError: there is no room.
    """
    given = _Given(Path(source))
    rows = checked_indices(indices, given.rows)
    description = {
        "format": FORMAT,
        "fastvq_version": __version__,
        "rows": len(rows),
        "shapes": [list(shape) for shape in given.shapes],
        "num_codes": list(given.num_codes),
        "num_classes": given.num_classes,
        "class_names": list(given.class_names),
        "arguments": {
            "model": ELSEWHERE,
            "dataset": given.checksum(),
            "indices": hashlib.sha256(rows.tobytes()).hexdigest(),
        },
        "rows_done": 0,
        "complete": False,
    }
    vectors = {SOURCE: rows}
    if given.labels is not None:
        vectors[LABELS] = given.labels[rows]

    def encoded(done: int) -> Encoded:
        for first in range(done, len(rows), _CHUNK):
            place = slice(first, min(first + _CHUNK, len(rows)))
            yield place, [given.codes(level, rows[place]) for level in range(len(given.shapes))]

    write_codes(Path(folder), description, vectors, encoded, flush_rows=_CHUNK)
    return Path(folder)


class _Given:
    """Files of another project, checked."""

    def __init__(self, source: Path) -> None:
        self.source, self.path = source, source / DESCRIPTION
        if not self.path.is_file():
            raise MissingFileError(f"source: {source} holds no {DESCRIPTION}, which says num_codes of each level")
        told = read_json(self.path)
        if "format" in told:
            raise ArgumentError(f"source: {source} holds codes as fastvq writes them, to train on as they are")
        arrays = dict(self._arrays())
        names = itertools.takewhile(arrays.__contains__, map("level{}".format, itertools.count()))
        self._levels = [arrays[name] for name in names]
        if not self._levels:
            raise MissingFileError(f"source: {source} holds neither {level_file(0)} nor {CODES_FILE} with level0")
        count, sizes = len(self._levels), integer(1, _LARGEST)
        one = isinstance(told.get("num_codes"), int)
        require_entries(self.path, told, {"num_codes": sizes if one else several(sizes, least=count, most=count)})
        kinds = {"num_classes": sizes, "class_names": several(TEXT, least=1), "shapes": _SHAPES}
        require_entries(self.path, told, kinds, absent=True)
        self.num_codes: tuple[int, ...] = (told["num_codes"],) * count if one else tuple(told["num_codes"])
        self.rows = len(self._levels[0])
        self.shapes = tuple(self._shapes(told.get("shapes")))
        self.class_names: tuple[str, ...] = tuple(told.get("class_names", ()))
        self.num_classes: int | None = told.get("num_classes", len(self.class_names) or None)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ArgumentError(f"{self.path}: expected {self.num_classes} class_names, got {len(self.class_names)}")
        self.labels = self._checked_labels(arrays.get("labels"))
        for level, codes in enumerate(self._levels):
            for first in range(0, self.rows, _CHUNK):
                _require_below(f"level{level}", codes[first : first + _CHUNK], self.num_codes[level])

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """By name, whichever file holds them."""
        if (self.source / CODES_FILE).is_file():
            yield from mapped_safetensors(self.source / CODES_FILE).items()
        for path in self._files():
            with reading(f"{path}: not a complete array file"):
                yield path.stem, np.load(path, mmap_mode="r", allow_pickle=False)

    def _files(self) -> list[Path]:
        return sorted([*self.source.glob("level*.npy"), *self.source.glob(LABELS)])

    def _shapes(self, told: Any) -> Iterator[tuple[int, int]]:
        if told is not None and len(told) != len(self._levels):
            raise ArgumentError(f"{self.path}: tells shapes of {len(told)} levels, there are {len(self._levels)}")
        for level, codes in enumerate(self._levels):
            _require_integers(f"level{level}", codes)
            shape = codes.shape[1:] if told is None else tuple(told[level])
            if len(shape) != 2 or codes.shape[1:] not in (shape, (shape[0] * shape[1],)):
                wanted = "[N, h, w]" if told is None else f"[N, {shape[0]}, {shape[1]}]"
                raise ArgumentError(f"level{level}: expected codes of shape {wanted}, got {list(codes.shape)}")
            if not 0 < len(codes) == self.rows:
                raise ArgumentError(f"level{level}: expected {self.rows or 'some'} rows as in level0, got {len(codes)}")
            yield shape

    def _checked_labels(self, labels: np.ndarray | None) -> np.ndarray | None:
        if labels is None and self.num_classes is None:
            return None
        if labels is None:
            raise MissingFileError(f"source: {self.path} tells of classes, but {self.source} holds no {LABELS}")
        if self.num_classes is None:
            raise ArgumentError(f"{self.path}: there are labels, expected num_classes or class_names, got neither")
        _require_integers("labels", labels)
        if labels.shape != (self.rows,):
            raise ArgumentError(f"labels: expected shape [{self.rows}], got {list(labels.shape)}")
        _require_below("labels", labels, self.num_classes)
        return labels.astype(np.int64)

    def codes(self, level: int, rows: np.ndarray) -> np.ndarray:
        """Codes of some rows, [B, h, w]."""
        return np.asarray(self._levels[level][rows]).reshape(-1, *self.shapes[level])

    def checksum(self) -> str:
        """Of all files."""
        files = [self.source / CODES_FILE, *self._files()]
        return hashlib.sha256("".join(sha256(path) for path in files if path.is_file()).encode()).hexdigest()


def _require_integers(name: str, values: np.ndarray) -> None:
    if values.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name}: expected integers, got {values.dtype}")


def _require_below(name: str, values: np.ndarray, count: int) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= count:
        raise ArgumentError(f"{name}: values must lie in 0..{count - 1}, got {low if low < 0 else high}")


def count_rows(source: str | os.PathLike[str]) -> int:
    """How many rows of codes :func:`import_codes` finds in a folder; errors are its own."""
    return _Given(Path(source)).rows
