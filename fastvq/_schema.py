"""What the entries of a JSON file must be, checked before anything is done with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastvq.errors import CorruptFileError

LARGEST = 2**63 - 1


class Kind(NamedTuple):
    """What a value must be, in words and as a test that raises nothing."""

    words: str
    test: Callable[[Any], bool]


def integer(low: int = 0, high: int = LARGEST) -> Kind:
    words = f"an integer in {low}..{high}" if high < LARGEST else f"an integer from {low}"
    return Kind(words, lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high)


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """An integer or a float; not NaN, but infinite where no bound is given."""
    bounds = "" if (low, high) == (-math.inf, math.inf) else f" in {low}..{high}"
    return Kind(
        f"a number{bounds}", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high
    )


TEXT = Kind("text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
ENTRIES = Kind("an object", lambda v: isinstance(v, dict))


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda v: v is None or kind.test(v))


def several(kind: Kind, *, least: int = 0, most: int | None = None) -> Kind:
    """A list; ``least`` and ``most`` bound its length."""
    counted = f"{least} to {most} of " if most is not None and most != least else f"{least} of " if least else ""
    longest = LARGEST if most is None else most
    return Kind(
        f"a list of {counted}{kind.words}",
        lambda v: isinstance(v, list) and least <= len(v) <= longest and all(map(kind.test, v)),
    )


def named(kind: Kind) -> Kind:
    """An object all of whose values are of one kind."""
    return Kind(
        f"an object of names with {kind.words} each",
        lambda v: isinstance(v, dict) and all(map(kind.test, v.values())),
    )


def require_entries(path: Path, value: Mapping[str, Any], kinds: Mapping[str, Kind], *, absent: bool = False) -> None:
    """Every entry named in ``kinds`` must be there (unless ``absent`` allows for none) and be of its kind.

    Raises:
        CorruptFileError: naming the file, the entry, what it is and what was expected.
    """
    for name, kind in kinds.items():
        if name not in value:
            if absent:
                continue
            raise CorruptFileError(f"{path}: missing or wrong entry: no {name}, expected {kind.words}")
        if not kind.test(value[name]):
            raise CorruptFileError(
                f"{path}: missing or wrong entry: {name} is {shortened(value[name])}, expected {kind.words}"
            )


def shortened(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:50] + "..."
