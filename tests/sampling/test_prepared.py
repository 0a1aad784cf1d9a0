"""What engines keep of a prior, and when they let go of it."""

from __future__ import annotations

import weakref

import pytest

from fastvq.sampling.engines.prepared import Kept


class Made:
    pass


def test_the_last_of_each_kind_is_kept() -> None:
    kept = Kept()
    first, other = kept.get("a", 1, Made), kept.get("b", 1, Made)
    assert kept.get("a", 1, Made) is first
    assert kept.get("a", 2, Made) is not first
    assert kept.get("a", 1, Made) is not first
    assert kept.get("b", 1, Made) is other


def test_what_is_replaced_goes_before_the_new_is_made() -> None:
    kept = Kept()
    gone = [weakref.ref(kept.get(kind, 1, Made)) for kind in ("a", "of a", "b")]

    def make() -> list[bool]:
        return [reference() is None for reference in gone]

    assert kept.get("a", 2, make, instead_of=("of a",)) == [True, True, False]


def test_what_cannot_be_made_is_tried_again() -> None:
    kept = Kept()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            kept.get("a", 1, lambda: 1 // 0)
    assert isinstance(kept.get("a", 1, Made), Made)
