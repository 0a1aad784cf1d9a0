"""Work cut into parts by index, for processes that know nothing of each other, and the files that each part leaves.

A part is a safetensors file and beside it one line of JSON, written last, that says what is in it. Whoever puts the
parts together finds every index there once, from one model, seed and settings, or an error that says what is missing.
What is computed for hours lies in a folder beside them (:func:`fill_shard`) until it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from fastvq._files import (
    read_json,
    remove_leftovers,
    replacing_file,
    require_seal,
    save_tensors,
    sealed,
    sha256,
    sweep,
    sync,
    write_json,
)
from fastvq._lock import locked
from fastvq._schema import ENTRIES, TEXT, integer, require_entries, shortened
from fastvq._tensors import Specs, mapped_tensors, new_tensors, read_rows, read_safetensors
from fastvq.errors import ArgumentError, CorruptFileError, DiskFullError, FileConflictError, MissingFileError

FORMAT = 1
FROM_ENVIRONMENT = "env"
_MOST = 2**40
_PLACE = {
    "format": integer(),
    "kind": TEXT,
    "total": integer(1, _MOST),
    "start": integer(0, _MOST),
    "stop": integer(0, _MOST),
    "identity": ENTRIES,
}
_ENTRIES = {**_PLACE, "sha256": TEXT}
_PROGRESS_ENTRIES = {**_PLACE, "rows_done": integer(0, _MOST)}
# Which part, of how many, and what the first is called and how far the next is from it: of SLURM arrays, of process
# groups, and of SLURM's tasks, of which a script that starts a process group is often one.
_VARIABLES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
_NAMED = 5
_TENSORS, _PROGRESS = "tensors.safetensors", "progress.json"
_SECONDS = 5.0

# Given memory maps of a part's tensors and how many rows are done: writes the next ones, yields how many are done then.
Fill = Callable[[dict[str, np.ndarray], int], Iterator[int]]


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 0.

    Raises:
        ArgumentError: there is no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ArgumentError(f"shard: expected I/N with I in 0..N-1, got {self}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``text``: ``I/N``, or ``env`` for what the environment says.

        Raises:
            ArgumentError: neither.
        """
        if text == FROM_ENVIRONMENT:
            return cls.from_environment()
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise ArgumentError(
                f"shard: expected I/N with I in 0..N-1, such as 0/8, or {FROM_ENVIRONMENT!r}, got {text!r}"
            )
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def from_environment(cls) -> Self:
        """The part that a scheduler gave this process.

        In a SLURM array, else by RANK and WORLD_SIZE, else among SLURM's tasks: the first that has several parts.

        Raises:
            ArgumentError: none of these is set, or not to a part.
        """
        alone = None
        for index, count, *more in _VARIABLES:
            if index in os.environ and count in os.environ:
                given = {name: os.environ[name] for name in (index, count, *more) if name in os.environ}
                found = _place(os.environ[index], os.environ[count], *map(os.environ.get, more, "01"))
                if found is None:
                    told = ", ".join(f"{name}={text!r}" for name, text in given.items())
                    raise ArgumentError(f"shard: 'env' found no part in {told}")
                if found[1] > 1:
                    return cls(*found)
                alone = alone or cls(*found)
        if alone is None:
            wanted = "; ".join(f"{index} and {count}" for index, count, *_ in _VARIABLES)
            raise ArgumentError(f"shard: 'env' needs one of these pairs of variables to be set: {wanted}")
        return alone

    def range(self, total: int) -> range:
        """Indices of this part of ``total``; all parts have 0..total-1, in order, and differ in size by one at most."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def path(self, folder: Path, prefix: str) -> Path:
        """The part's file of tensors in a folder, whose name begins with ``prefix``."""
        return folder / f"{prefix}-{self.index:05d}-of-{self.count:05d}.safetensors"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def _place(index: str, count: str, first: str = "0", step: str = "1") -> tuple[int, int] | None:
    """Which part of how many; None if the numbers name none."""
    if not all(map(str.isdecimal, (index, count, first, step))) or int(step) == 0:
        return None
    place, rest = divmod(int(index) - int(first), int(step))
    return None if rest or not 0 <= place < int(count) else (place, int(count))


@dataclass(frozen=True)
class StoredShard:
    """A part that is finished.

    Attributes:
        path: its file of tensors.
        indices: what it holds of 0..total-1.
        identity: what all parts of one whole have in common: model, seed, settings.
    """

    path: Path
    kind: str
    total: int
    indices: range
    identity: dict[str, Any]
    checksum: str

    def verify(self) -> None:
        """Read the tensors' file once and compare it with the checksum from when it was written.

        Raises:
            CorruptFileError: it has changed since.
        """
        if sha256(self.path) != self.checksum:
            raise CorruptFileError(
                f"{self.path}: checksum differs from the one in {description_of(self.path).name}; remove both files "
                "and compute this part anew"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own."""
        return read_safetensors(self.path)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor, counted from the part's first, read alone."""
        return read_rows(self.path, name, rows)

    def stretches(self, count: int = 4096) -> Iterator[slice]:
        """The part's rows, some at a time."""
        for row in range(0, len(self.indices), count):
            yield slice(row, min(row + count, len(self.indices)))


def description_of(path: Path) -> Path:
    """The line of JSON beside a part's file of tensors."""
    return path.with_suffix(".json")


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], *, kind: str, total: int, indices: range, identity: Mapping[str, Any]
) -> StoredShard:
    """Write a part, its description last: what has one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_way(path)
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return _describe(path, _description(kind, total, indices, identity))


def fill_shard(
    path: Path,
    specs: Specs,
    fill: Fill,
    *,
    kind: str,
    total: int,
    indices: range,
    identity: Mapping[str, Any],
) -> StoredShard:
    """Compute a part, or what a killed call left of it to do; returns at once if it is there.

    Until it is whole it lies in a folder of its name that ends in ``.unfinished``, in memory maps, so that its size is
    not bounded by memory; how far it is reaches the disk every few seconds.

    Args:
        specs: of the tensors, whose rows are the part's indices.
        fill: what computes them; may compute rows again that it yielded before.

    Raises:
        FileConflictError: another process is at it (names it), or what is there, other parts included, is of another
            model, seed or settings.
        CorruptFileError: what is there is damaged.
        DiskFullError: there is no room for all tensors; found out before anything is computed.
    """
    description = _description(kind, total, indices, identity)
    with working_on(path) as unfinished:
        found = finished_shard(path, kind=kind, total=total, indices=indices, identity=identity)
        if found is None:
            prefix = path.name.rpartition("-of-")[0].rpartition("-")[0]
            whole = {name: description[name] for name in ("kind", "total", "identity")}
            require_same_whole(path.parent, prefix, **whole)
            _fill(path, unfinished, specs, fill, description)
            _make_way(path)
            os.replace(unfinished / _TENSORS, path)
            found = _describe(path, description)
        for name in (_TENSORS, _PROGRESS):
            (unfinished / name).unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def working_on(path: Path) -> Iterator[Path]:
    """Have a part for this thread alone; gives the folder of what is unfinished of it, which goes once it is empty.

    Raises:
        FileConflictError: another process, or thread, has it; names it.
    """
    unfinished = path.with_suffix(".unfinished")
    try:
        with locked(unfinished):
            yield unfinished
    finally:
        with contextlib.suppress(OSError):
            unfinished.rmdir()


def _fill(path: Path, unfinished: Path, specs: Specs, fill: Fill, description: Mapping[str, Any]) -> None:
    sweep(unfinished)
    tensors, progress = unfinished / _TENSORS, unfinished / _PROGRESS
    if progress.is_file() and not tensors.is_file() and path.is_file():  # killed before the description was written
        os.replace(path, tensors)
    if progress.is_file() and tensors.is_file():
        done, arrays = _rows_done(progress, description), mapped_tensors(tensors, specs)
    else:
        done, arrays = 0, new_tensors(tensors, specs)
        try:
            _reached(unfinished, arrays, description, done)
        except DiskFullError:
            tensors.unlink()
            raise
    rows, saved = description["stop"] - description["start"], time.monotonic()
    for reached in fill(arrays, done) if done < rows else ():
        if reached == rows or time.monotonic() - saved >= _SECONDS:
            _reached(unfinished, arrays, description, reached)
            saved = time.monotonic()


def _reached(
    unfinished: Path, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any], rows_done: int
) -> None:
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    sync(unfinished / _TENSORS)
    write_json(unfinished / _PROGRESS, sealed({**description, "rows_done": rows_done}))


def _rows_done(progress: Path, description: Mapping[str, Any]) -> int:
    found = read_json(progress)
    require_entries(progress, found, _PROGRESS_ENTRIES)
    require_seal(progress, found)
    _require_same(progress.parent, found, description)
    done: int = found["rows_done"]
    if done > description["stop"] - description["start"]:
        raise CorruptFileError(f"{progress}: rows_done is {done}, more than the part has")
    return done


def _description(kind: str, total: int, indices: range, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a part says of itself, as it will be read from JSON."""
    entries = {
        "format": FORMAT,
        "kind": kind,
        "total": total,
        "start": indices.start,
        "stop": indices.stop,
        "identity": dict(identity),
    }
    found: dict[str, Any] = json.loads(json.dumps(entries))
    return found


def _make_way(path: Path) -> None:
    """Nothing says any more that there is a part, and nothing is left of earlier writers."""
    description_of(path).unlink(missing_ok=True)
    remove_leftovers(path, description_of(path))


def _describe(path: Path, description: Mapping[str, Any]) -> StoredShard:
    sync(path)
    sync(path.parent)
    text = json.dumps(sealed({**description, "sha256": sha256(path)}))
    with replacing_file(description_of(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return read_shard(path)


def read_shard(path: Path) -> StoredShard:
    """What a part says of itself.

    Raises:
        MissingFileError, CorruptFileError: a file is not there or damaged.
    """
    place = description_of(path)
    found = read_json(place)
    require_entries(place, found, _ENTRIES)
    if found["format"] != FORMAT:
        raise CorruptFileError(f"{place}: format {found['format']!r}, expected {FORMAT}")
    require_seal(place, found)
    if not found["start"] <= found["stop"] <= found["total"]:
        raise CorruptFileError(f"{place}: indices {found['start']}..{found['stop']} of {found['total']}")
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file, though {place.name} beside it says there is")
    indices = range(found["start"], found["stop"])
    return StoredShard(path, found["kind"], found["total"], indices, found["identity"], found["sha256"])


def finished_shard(
    path: Path, *, kind: str, total: int, indices: range, identity: Mapping[str, Any]
) -> StoredShard | None:
    """The part if it is there already, its checksum compared; None if it is still to be computed.

    Raises:
        FileConflictError: there is one of another model, seed or settings; names what differs.
        CorruptFileError: it is damaged.
    """
    if not description_of(path).is_file():
        return None
    found = read_shard(path)
    _require_same(
        path,
        _description(found.kind, found.total, found.indices, found.identity),
        _description(kind, total, indices, identity),
    )
    found.verify()
    return found


def _require_same(place: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = ("kind", "total", "start", "stop")
    differing = _differences(
        {**{name: there[name] for name in names}, **there["identity"]},
        {**{name: now[name] for name in names}, **now["identity"]},
    )
    if differing:
        raise FileConflictError(
            f"{place}: holds another part, which differs in\n  " + "\n  ".join(differing) + "\nNothing was written."
        )


def read_shards(folder: Path, prefix: str) -> list[StoredShard]:
    """All parts of a whole, in the order of their indices.

    Raises:
        MissingFileError: there is none, or an index is missing; names the gaps.
        FileConflictError: an index is there twice, or parts are of different models, seeds or settings.
        CorruptFileError: a description is damaged.
    """
    found = _finished(folder, prefix)
    if not found:
        raise MissingFileError(f"folder: {folder} holds no finished part ({prefix}-*.json)")
    first = found[0]
    for other in found[1:]:
        differing = _differences(_whole(first), _whole(other), (f"in {first.path.name}", f"in {other.path.name}"))
        if differing:
            raise FileConflictError(
                f"folder: parts in {folder} belong to different wholes; they differ in\n  " + "\n  ".join(differing)
            )
    found.sort(key=lambda shard: _ends(shard.indices))
    _require_each_once(folder, found)
    return found


def require_same_whole(folder: Path, prefix: str, *, kind: str, total: int, identity: Mapping[str, Any]) -> None:
    """What is finished in a folder must be parts of the same whole as the one to come.

    Raises:
        FileConflictError: one is not; names it and what differs.
        CorruptFileError: a description is damaged.
    """
    for shard in _finished(folder, prefix):
        differing = _differences(_whole(shard), {"kind": kind, "total": total, **json.loads(json.dumps(identity))})
        if differing:
            raise FileConflictError(
                f"{shard.path}: is a part of another whole, which differs in\n  "
                + "\n  ".join(differing)
                + "\nNothing was written."
            )


def _finished(folder: Path, prefix: str) -> list[StoredShard]:
    return [read_shard(place.with_suffix(".safetensors")) for place in sorted(folder.glob(f"{prefix}-*-of-*.json"))]


def _whole(shard: StoredShard) -> dict[str, Any]:
    return {"kind": shard.kind, "total": shard.total, **shard.identity}


def _require_each_once(folder: Path, found: Sequence[StoredShard]) -> None:
    gaps, reached, before = [], 0, found[0]
    for shard in found:
        if shard.indices.start < reached and len(shard.indices):
            raise FileConflictError(
                f"folder: indices {shard.indices.start}..{min(reached, shard.indices.stop) - 1} are in {folder} twice, "
                f"in {before.path.name} and {shard.path.name}; remove one of them"
            )
        if shard.indices.start > reached:
            gaps.append(f"{reached}..{shard.indices.start - 1}")
        if shard.indices.stop > reached:
            reached, before = shard.indices.stop, shard
    if reached < found[0].total:
        gaps.append(f"{reached}..{found[0].total - 1}")
    if gaps:
        more = ", ..." if len(gaps) > _NAMED else ""
        raise MissingFileError(
            f"folder: {folder} lacks indices {', '.join(gaps[:_NAMED])}{more} of 0..{found[0].total - 1}; run the "
            "parts that were not finished again"
        )


def _ends(indices: range) -> tuple[int, int]:
    return indices.start, indices.stop


def _differences(
    there: Mapping[str, Any], now: Mapping[str, Any], places: tuple[str, str] = ("there", "now")
) -> list[str]:
    return [
        f"{name}: {shortened(there.get(name))} {places[0]}, {shortened(now.get(name))} {places[1]}"
        for name in dict.fromkeys([*there, *now])
        if there.get(name) != now.get(name)
    ]
