"""Work cut into parts by index, for processes that know nothing of each other, and the files that each part leaves.

A part is a safetensors file and beside it one line of JSON, written last, that says what is in it. Whoever puts the
parts together finds every index there once, from one model, seed and settings, or an error that says what is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fastvq._files import read_json, replacing_file, require_seal, save_tensors, sealed, sha256
from fastvq._schema import ENTRIES, TEXT, integer, require_entries, shortened
from fastvq._tensors import read_safetensors
from fastvq.errors import ArgumentError, CorruptFileError, FileConflictError, MissingFileError

FORMAT = 1
FROM_ENVIRONMENT = "env"
_ENTRIES = {
    "format": integer(),
    "kind": TEXT,
    "total": integer(1, 2**40),
    "start": integer(0, 2**40),
    "stop": integer(0, 2**40),
    "identity": ENTRIES,
    "sha256": TEXT,
}
# Which part, of how many, and what the first is called: of SLURM arrays, of SLURM's tasks, and of process groups.
_VARIABLES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
    ("RANK", "WORLD_SIZE", None),
)
_NAMED = 5


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 0."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ArgumentError(f"shard: expected I/N with I in 0..N-1, got {self}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """``I/N``, or ``env`` for what the environment says.

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
        """The part that a scheduler gave this process: a SLURM array, else SLURM's tasks, else RANK and WORLD_SIZE.

        Raises:
            ArgumentError: none of these is set, or not to numbers.
        """
        for index, count, first in _VARIABLES:
            if index in os.environ and count in os.environ:
                names = [name for name in (index, count, first) if name is not None and name in os.environ]
                given = [os.environ[name] for name in names]
                if not all(map(str.isdecimal, given)):
                    raise ArgumentError(
                        f"shard: expected numbers in {', '.join(names)}, got {', '.join(map(repr, given))}"
                    )
                place, total, *rest = map(int, given)
                return cls(place - sum(rest), total)
        wanted = "; ".join(f"{index} and {count}" for index, count, _ in _VARIABLES)
        raise ArgumentError(f"shard: 'env' needs one of these pairs of variables to be set: {wanted}")

    def range(self, total: int) -> range:
        """Indices of this part; those of all parts are 0..total-1 in order, and sizes differ by one at most."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def path(self, folder: Path, prefix: str) -> Path:
        """The part's file of tensors."""
        return folder / f"{prefix}-{self.index:05d}-of-{self.count:05d}.safetensors"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


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
        return read_safetensors(self.path)


def description_of(path: Path) -> Path:
    """The line of JSON beside a part's file of tensors."""
    return path.with_suffix(".json")


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], *, kind: str, total: int, indices: range, identity: Mapping[str, Any]
) -> StoredShard:
    """Write a part, its description last: what has one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    description = {
        "format": FORMAT,
        "kind": kind,
        "total": total,
        "start": indices.start,
        "stop": indices.stop,
        "identity": dict(identity),
        "sha256": sha256(path),
    }
    with replacing_file(description_of(path)) as temporary:
        temporary.write_text(json.dumps(sealed(description)) + "\n", encoding="utf-8")
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
    there = {"kind": found.kind, "total": found.total, "indices": list(_ends(found.indices)), **found.identity}
    now = {"kind": kind, "total": total, "indices": list(_ends(indices)), **json.loads(json.dumps(dict(identity)))}
    differing = _differences(there, now)
    if differing:
        raise FileConflictError(
            f"{path}: holds another part, which differs in\n  " + "\n  ".join(differing) + "\nNothing was written."
        )
    found.verify()
    return found


def read_shards(folder: Path, prefix: str) -> list[StoredShard]:
    """All parts of a whole, in the order of their indices.

    Raises:
        MissingFileError: there is none, or an index is missing; names the gaps.
        FileConflictError: an index is there twice, or parts are of different models, seeds or settings.
        CorruptFileError: a description is damaged.
    """
    found = [read_shard(place.with_suffix(".safetensors")) for place in sorted(folder.glob(f"{prefix}-*-of-*.json"))]
    if not found:
        raise MissingFileError(f"folder: {folder} holds no finished part ({prefix}-*.json)")
    first = found[0]
    for other in found[1:]:
        differing = _differences(
            {"kind": first.kind, "total": first.total, **first.identity},
            {"kind": other.kind, "total": other.total, **other.identity},
        )
        if differing:
            raise FileConflictError(
                f"folder: {first.path.name} and {other.path.name} in {folder} are no parts of one whole; they differ "
                "in\n  " + "\n  ".join(differing)
            )
    found.sort(key=lambda shard: _ends(shard.indices))
    _require_each_once(folder, found)
    return found


def _require_each_once(folder: Path, found: Sequence[StoredShard]) -> None:
    gaps, reached = [], 0
    for before, shard in zip([None, *found], found, strict=False):
        if shard.indices.start < reached and len(shard.indices):
            assert before is not None
            raise FileConflictError(
                f"folder: indices {shard.indices.start}..{min(reached, shard.indices.stop) - 1} are in {folder} twice, "
                f"in {before.path.name} and {shard.path.name}; remove one of them"
            )
        if shard.indices.start > reached:
            gaps.append(f"{reached}..{shard.indices.start - 1}")
        reached = max(reached, shard.indices.stop)
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


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {shortened(there.get(name))} there, {shortened(now.get(name))} now"
        for name in dict.fromkeys([*there, *now])
        if there.get(name) != now.get(name)
    ]
