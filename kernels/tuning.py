"""Tiles that were measured to be quickest, by compute capability, kernel and sizes: the table ``tuned.json``.

A kernel's one function of sizes to tiles asks `tuned` first and falls back to its own rule. ``python -m
bench.gpu.tune`` writes the table, which lies beside this file; nothing has been tuned yet, and it is empty. In such a
function::

    found = tuned("nearest_code", capability, f"d{width} k{codes}", CANDIDATES)
    return found or Tiles(...)  # the rule

where ``sizes`` may round what hardly matters, such as numbers of codes to powers of two, so that shapes share an entry.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from fastvq._files import read_json
from fastvq._schema import ENTRIES, require_entries
from fastvq.errors import CorruptFileError

__all__ = ["FORMAT", "TABLE", "Asked", "asking", "planned", "tuned"]

FORMAT = 1
TABLE = Path(__file__).with_name("tuned.json")
# Block sizes, warps and stages, by name; a NamedTuple.
Tiles = TypeVar("Tiles", bound=tuple[Any, ...])
Plan = TypeVar("Plan", bound=Callable[..., Any])
_MOST_PLANS = 256


class Asked(NamedTuple):
    """What a kernel has asked for."""

    kernel: str
    capability: int
    sizes: str
    candidates: tuple[Any, ...]


# While tiles are measured: what was asked, and the tiles that a kernel gets.
_asked: list[Asked] | None = None
_instead: dict[tuple[str, int, str], Any] = {}
# What has been worked out from tiles.
_plans: list[Any] = []


def tuned(kernel: str, capability: int, sizes: str, candidates: Sequence[Tiles]) -> Tiles | None:
    """The quickest tiles of a kernel, or None where they have not been measured and its own rule decides.

    Args:
        capability: such as 90.
        sizes: everything that the choice depends on, in a few words: ``d64 k512``.
        candidates: tiles that run with these sizes on any GPU.

    Raises:
        CorruptFileError: the table cannot be read, or has an entry that is none of the candidates.
    """
    if _asked is not None:
        _asked.append(Asked(kernel, capability, sizes, tuple(candidates)))
    if (kernel, capability, sizes) in _instead:
        found: Tiles = _instead[kernel, capability, sizes]
        return found
    stored = _table(TABLE).get((str(capability), kernel, sizes))
    if stored is None:
        return None
    fitting = [tiles for tiles in candidates if _fields(tiles) == stored]
    if not fitting:
        raise CorruptFileError(f"{TABLE}: tiles/{capability}/{kernel}/{sizes}: {stored} is none of its candidates")
    return fitting[0]


def planned(function: Plan) -> Plan:
    """`functools.lru_cache` for a function that asks for tiles: its results are forgotten when others are measured."""
    kept = functools.lru_cache(maxsize=_MOST_PLANS)(function)
    _plans.append(kept)
    return cast(Plan, kept)


def _forget_plans() -> None:
    for kept in _plans:
        kept.cache_clear()


@contextlib.contextmanager
def asking(which: tuple[str, int, str] | None = None, tiles: Any = None) -> Iterator[list[Asked]]:
    """Notes what is asked inside the block. For measuring: of the whole process, as backward passes run in threads.

    Args:
        which: kernel, capability and sizes that get ``tiles`` in the block; None for none.
    """
    global _asked
    before, _asked = _asked, []
    _forget_plans()
    if which is not None:
        _instead[which] = tiles
    try:
        yield _asked
    finally:
        _asked = before
        _forget_plans()
        if which is not None:
            del _instead[which]


def _fields(tiles: Any) -> dict[str, int]:
    fields: dict[str, int] = tiles._asdict()
    return fields


@functools.cache
def _table(path: Path) -> dict[tuple[str, str, str], dict[str, int]]:
    """By capability, kernel and sizes."""
    value = read_json(path)
    require_entries(path, value, {"tiles": ENTRIES})
    if value.get("format") != FORMAT:
        raise CorruptFileError(f"{path}: format is {value.get('format')!r}, expected {FORMAT}")
    found = {}
    for capability, kernels in _objects(path, "tiles", value["tiles"]):
        for kernel, sizes in _objects(path, f"tiles/{capability}", kernels):
            for size, tiles in _objects(path, f"tiles/{capability}/{kernel}", sizes):
                found[capability, kernel, size] = tiles
    return found


def _objects(path: Path, where: str, value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in value.items():
        if not isinstance(entry, dict):
            raise CorruptFileError(f"{path}: {where}/{name}: expected an object, got {entry!r}")
        yield name, entry
