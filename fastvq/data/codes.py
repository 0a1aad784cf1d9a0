"""Codes of a data set on disk: written once, and read by the priors through memory maps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvq._config import Config
from fastvq._files import new_array, read_json, reading, require_seal, reserve, sealed, sha256, sweep, sync, write_json
from fastvq._lock import locked
from fastvq._schema import ENTRIES, FLAG, TEXT, integer, named, optional, require_entries, several
from fastvq._tensors import smallest_type
from fastvq.data.base import spread_over_classes
from fastvq.data.usage import CodeUse
from fastvq.errors import ArgumentError, CorruptFileError, DiskFullError, FileConflictError, MissingFileError

FORMAT = 1
DESCRIPTION = "codes.json"
LABELS, SOURCE = "labels.npy", "source.npy"
# Where some rows lie, and their codes of each level, [B, h, w].
Encoded = Iterator[tuple[slice, Sequence[np.ndarray]]]
_LARGEST = 2**31
_COUNTED = 4096  # rows at a time
_ENTRIES = {
    "rows": integer(1, 2**40),
    "shapes": several(several(integer(1, _LARGEST), least=2, most=2), least=1),
    "num_codes": several(integer(1, _LARGEST), least=1),
    "num_classes": optional(integer(1, _LARGEST)),
    "class_names": several(TEXT),
    "arguments": ENTRIES,
    "rows_done": integer(0, 2**40),
    "complete": FLAG,
}


def level_file(level: int) -> str:
    return f"level{level}.npy"


def model_checksum(model: nn.Module) -> str:
    """SHA-256 over a model's class, configuration, parameters and buffers."""
    config = getattr(model, "config", None)
    settings = None
    if isinstance(config, Config):
        settings = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        settings = dataclasses.asdict(config)
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings], default=str).encode())
    add_tensors(digest, sorted(model.state_dict().items()))
    return digest.hexdigest()


def add_tensors(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Let a checksum depend on tensors: on their names, types, shapes and values."""
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def checked_indices(indices: np.ndarray | Tensor | Sequence[int] | None, count: int) -> np.ndarray:
    """Rows that were asked for, int64; all of them for None."""
    rows = np.arange(count) if indices is None else np.asarray(indices)
    if rows.ndim != 1 or len(rows) == 0 or rows.dtype.kind not in "iu":
        raise ArgumentError(f"indices: expected a non-empty list of integers, got {rows.dtype} of shape {rows.shape}")
    rows = rows.astype(np.int64)
    if rows.min() < 0 or rows.max() >= count:
        raise ArgumentError(f"indices: must lie in 0..{count - 1}, got {rows.min()}..{rows.max()}")
    return rows


def write_codes(
    folder: Path,
    description: dict[str, Any],
    vectors: Mapping[str, np.ndarray],
    encoded: Callable[[int], Encoded],
    *,
    flush_rows: int,
) -> None:
    """Fill a folder with codes, from the last rows on that reached the disk; returns at once if they are all there.

    Args:
        description: what ``codes.json`` says of them.
        vectors: its other arrays, int64 [rows], by the names of their files.
        encoded: given how many rows are done, the next ones: where they lie, and the codes of each level.

    Raises:
        FileConflictError: the folder holds something else, or other codes.
        CorruptFileError: files of an earlier, interrupted call are damaged.
        DiskFullError: there is no room for all codes; nothing has been encoded and nothing is left behind.
    """
    if folder.exists() and not folder.is_dir():
        raise FileConflictError(f"folder: {folder} is a file; nothing was written")
    with locked(folder):
        sweep(folder)
        done, total = _resume_point(folder, description), description["rows"]
        if done == total:
            CodeDataset(folder)  # the files may have been damaged since
            return
        arrays = _open_arrays(folder, description, vectors, create=done == 0)
        unflushed = 0
        for rows, codes in encoded(done):
            for array, grid in zip(arrays, codes, strict=True):
                array[rows] = grid
            done, unflushed = rows.stop, unflushed + rows.stop - rows.start
            if unflushed >= flush_rows or done == total:
                _flush(folder, arrays, {**description, "rows_done": done, "complete": done == total})
                unflushed = 0


def _resume_point(folder: Path, description: dict[str, Any]) -> int:
    """How many rows an earlier call with the same arguments finished; 0 also for an empty folder."""
    # An interruption of the very first write leaves nothing but a temporary file, whose name begins with a dot.
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return 0
    if not (folder / DESCRIPTION).is_file():
        raise FileConflictError(f"folder: {folder} is not empty and holds no {DESCRIPTION}; nothing was written")
    there = read_json(folder / DESCRIPTION)
    if there.get("format") != FORMAT:
        raise FileConflictError(f"folder: {folder} holds codes of format {there.get('format')!r}, expected {FORMAT}")
    there = _read_description(folder)
    differences = [
        f"{name}: {_short(old)} there, {_short(new)} now"
        for name, new in description["arguments"].items()
        if (old := there["arguments"].get(name)) != new
    ]
    differences += [
        f"{name}: {there.get(name)} there, {description[name]} now"
        for name in ("rows", "shapes", "num_codes", "num_classes", "class_names")
        if there.get(name) != description[name]
    ]
    if differences:
        raise FileConflictError(
            f"folder: {folder} holds codes that differ in\n  " + "\n  ".join(differences) + "\nNothing was written."
        )
    done: int = there["rows_done"]
    if done > description["rows"]:
        raise CorruptFileError(f"{folder / DESCRIPTION}: rows_done is {done!r}, expected 0..{description['rows']}")
    return done


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."


def _open_arrays(
    folder: Path, description: dict[str, Any], vectors: Mapping[str, np.ndarray], *, create: bool
) -> list[np.ndarray]:
    """Writable memory maps, one per level. The description is written first: it claims the folder."""
    if not create:
        for level, (shape, dtype) in enumerate(_specs(description)):
            _mapped(folder / level_file(level), shape, dtype)
            reserve(folder / level_file(level), (folder / level_file(level)).stat().st_size)
        return [
            _mapped(folder / level_file(level), *spec, writable=True) for level, spec in enumerate(_specs(description))
        ]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_json(folder / DESCRIPTION, sealed(description))
        for name, vector in vectors.items():
            new_array(folder / name, vector.shape, vector.dtype)[:] = vector
            sync(folder / name)
        return [new_array(folder / level_file(level), *spec) for level, spec in enumerate(_specs(description))]
    except DiskFullError:
        for name in (*vectors, *map(level_file, range(len(description["shapes"]))), DESCRIPTION):
            (folder / name).unlink(missing_ok=True)
        raise


def _flush(folder: Path, arrays: list[np.ndarray], description: dict[str, Any]) -> None:
    for level, array in enumerate(arrays):
        assert isinstance(array, np.memmap)
        array.flush()
        sync(folder / level_file(level))
    if description["complete"]:
        names = [name for name in (SOURCE, LABELS) if (folder / name).is_file()]
        names += [level_file(level) for level in range(len(arrays))]
        description["sha256"] = {name: sha256(folder / name) for name in names}
    write_json(folder / DESCRIPTION, sealed(description))


def _read_description(folder: Path) -> dict[str, Any]:
    """The checked entries of a folder's description."""
    path = folder / DESCRIPTION
    description = read_json(path)
    if description.get("format") != FORMAT:
        raise CorruptFileError(f"{path}: format {description.get('format')!r}, expected {FORMAT}")
    require_entries(path, description, _ENTRIES)
    require_entries(path, description, {"sha256": named(TEXT)}, absent=True)
    require_entries(path, description["arguments"], {"model": TEXT, "dataset": TEXT})
    if len(description["shapes"]) != len(description["num_codes"]):
        raise CorruptFileError(
            f"{path}: missing or wrong entry: {len(description['shapes'])} shapes, but num_codes is "
            f"{description['num_codes']}"
        )
    require_seal(path, description)
    return description


def _specs(description: dict[str, Any]) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and element type of each level's array."""
    specs = []
    for shape, num_codes in zip(description["shapes"], description["num_codes"], strict=True):
        specs.append(((description["rows"], *shape), smallest_type(num_codes)))
    return specs


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype, *, writable: bool = False) -> np.ndarray:
    """A memory map of an array file that is checked to be exactly what it should be."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file, though {DESCRIPTION} beside it says there is")
    with reading(f"{path}: not a complete array file"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
            raise ValueError("it holds something else than one array by rows")
    if array.shape != shape or array.dtype != dtype:
        raise CorruptFileError(
            f"{path}: holds {array.dtype} of shape {list(array.shape)}, expected {dtype} of shape {list(shape)}"
        )
    size = path.stat().st_size
    if size != array.offset + array.nbytes:
        raise CorruptFileError(f"{path}: {size} bytes, expected {array.offset + array.nbytes}")
    # Only now: NumPy lengthens a file that is too short when it maps it for writing.
    return np.load(path, mmap_mode="r+", allow_pickle=False) if writable else array


class CodeDataset:
    """Codes written by :func:`fastvq.data.extract_codes`, read through memory maps.

    Args:
        folder: where they are.

    Attributes:
        shapes: (h, w) of each level, top first.
        num_codes: codebook size of each level.
        num_classes, class_names: of the labels; None and empty without labels.
        labels: int64 [N] or None.
        source: int64 [N], index of each row's image in the data set the codes come from.
        model: checksum of the model that wrote the codes.
        dataset: fingerprint of the data set they come from.

    Raises:
        MissingFileError: the folder or one of its files is missing.
        CorruptFileError: the extraction is not complete, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise MissingFileError(f"folder: {self.folder} holds no {DESCRIPTION}, so it is not a folder of codes")
        description = _read_description(self.folder)
        if not description["complete"]:
            raise CorruptFileError(
                f"{self.folder}: the extraction is not complete ({description['rows_done']} of "
                f"{description['rows']} rows); run it again to go on"
            )
        specs = _specs(description)
        self._rows: int = description["rows"]
        self.shapes: tuple[tuple[int, int], ...] = tuple((h, w) for h, w in description["shapes"])
        self.num_codes: tuple[int, ...] = tuple(description["num_codes"])
        self.num_classes: int | None = description["num_classes"]
        self.class_names: tuple[str, ...] = tuple(description["class_names"])
        self.model: str = description["arguments"]["model"]
        self.dataset: str = description["arguments"]["dataset"]
        self._arguments = json.dumps([self._rows, self.shapes, self.num_codes, description["arguments"]])
        self._checksums: dict[str, str] = description.get("sha256", {})
        self._arrays = [_mapped(self.folder / level_file(level), *spec) for level, spec in enumerate(specs)]
        self.source = self._vector(SOURCE)
        self.labels = self._vector(LABELS) if self.num_classes is not None else None
        if self.labels is not None and bool(((self.labels < 0) | (self.labels >= self.num_classes)).any()):
            raise CorruptFileError(f"{self.folder / LABELS}: labels outside 0..{self.num_classes - 1}")
        self._compare(SOURCE, LABELS)

    def verify(self) -> None:
        """Read all codes once and compare them with the checksums from when they were written.

        Opening a folder checks sizes, headers, source and labels only, which takes no time; this reads as fast as the
        disk or SHA-256 allows. Training does so before its first step. Folders of older versions have no checksums.

        Raises:
            CorruptFileError: a file was changed or damaged since.
        """
        self._compare(*map(level_file, range(self.num_levels)))

    def _compare(self, *names: str) -> None:
        for name in names:
            if name in self._checksums and sha256(self.folder / name) != self._checksums[name]:
                raise CorruptFileError(
                    f"{self.folder / name}: checksum differs from the one in {DESCRIPTION}; extract the codes anew"
                )

    def _vector(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(_mapped(self.folder / name, (self._rows,), np.dtype(np.int64))))

    def __len__(self) -> int:
        return self._rows

    @property
    def num_levels(self) -> int:
        """Number of grids of codes of an image."""
        return len(self.shapes)

    def fingerprint(self) -> str:
        """Hash of what the codes are: model, images, augmentation."""
        return hashlib.sha256(self._arguments.encode()).hexdigest()

    def codes(self, level: int, rows: np.ndarray | Tensor | slice) -> Tensor:
        """Codes of some rows: int64 [B, h, w].

        Args:
            level: 0 for the top.
            rows: which of the N rows.

        Raises:
            ArgumentError: no such level.
            CorruptFileError: a stored code lies outside the codebook.
        """
        if not 0 <= level < self.num_levels:
            raise ArgumentError(f"level: expected 0..{self.num_levels - 1}, got {level}")
        if isinstance(rows, Tensor):
            rows = rows.numpy()
        codes = np.asarray(self._arrays[level])[rows].astype(np.int64)
        if codes.size and (codes.max() >= self.num_codes[level] or codes.min() < 0):
            raise CorruptFileError(
                f"{self.folder / level_file(level)}: holds code {codes.max()}, expected 0..{self.num_codes[level] - 1}"
            )
        return torch.from_numpy(codes)

    def use(self, level: int, *, most: int | None = None) -> CodeUse:
        """How the codes of a level are used.

        Args:
            level: 0 for the top.
            most: count over so many evenly spaced rows; None: over all.
        """
        rows = np.arange(self._rows) if most is None else spread_over_classes(None, self._rows, most)
        counts = torch.zeros(self.num_codes[level], dtype=torch.int64)
        for part in np.array_split(rows, -(-len(rows) // _COUNTED)):
            counts += torch.bincount(self.codes(level, part).flatten(), minlength=len(counts))
        return CodeUse.of_counts(level, self.num_levels, counts)
