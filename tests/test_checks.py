"""Checks of arguments: what each lets pass, and the words it refuses the rest with."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastvq._check import require_bool, require_number, require_odd, require_positive_int, require_real, require_seed
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.training import TrainConfig


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)], ids=["int", "int64", "uint8"])
def test_integers_become_those_of_python(value: Any) -> None:
    assert require_positive_int("x", value) == 3
    assert type(require_positive_int("x", value)) is int
    widths = TrainConfig(steps=value, batch_size=2).to_dict()
    assert type(widths["steps"]) is int


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, "3", None, np.array([3])], ids=repr)
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="^x: expected an int, got "):
        require_positive_int("x", value)


@pytest.mark.parametrize(
    ("inside", "outside", "bounds", "expected"),
    [
        (0, 1, {"least": 0, "below": 1}, r"must lie in \[0, 1\)"),
        (1.0, 0, {"above": 0, "most": 1}, r"must lie in \(0, 1\]"),
        (Fraction(1, 2), 1, {"above": 0, "below": 1}, r"must lie in \(0, 1\)"),
        (3e38, -1, {"least": 0}, "must not be negative, and finite"),
        (1e-300, 0, {"above": 0}, "must be above 0 and finite"),
        (-2, -1, {"most": -2}, "must be at most -2 and finite"),
    ],
    ids=["half-open", "open-below", "open", "not-negative", "positive", "at-most"],
)
def test_numbers_keep_to_their_bounds(inside: Any, outside: int, bounds: dict[str, float], expected: str) -> None:
    assert require_number("x", inside, **bounds) == float(inside)
    with pytest.raises(ArgumentError, match=f"^x: {expected}, got {outside}$"):
        require_number("x", outside, **bounds)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400), 1e39])
def test_numbers_are_finite_as_float32(value: float) -> None:
    with pytest.raises(ArgumentError, match="x: must be finite, got"):
        require_number("x", value)


@pytest.mark.parametrize(("value", "expected"), [(10**400, math.inf), (-(10**400), -math.inf), (Fraction(1, 4), 0.25)])
def test_a_real_of_any_size_becomes_a_float(value: Any, expected: float) -> None:
    assert require_real("x", value) == expected


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_numbers_are_of_no_other_type(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match=f"x: expected a number, got {type(value).__name__} "):
        require_number("x", value)


@pytest.mark.parametrize("bits", [63, 64])
def test_seeds_fill_their_bits(bits: int) -> None:
    assert require_seed("seed", 2**bits - 1, bits) == 2**bits - 1
    for value in (-1, 2**bits):
        with pytest.raises(ArgumentError, match=rf"seed: must lie in 0..2\*\*{bits}-1, got {value}"):
            require_seed("seed", value, bits)
    with pytest.raises(ArgumentTypeError, match="seed: expected an int, got bool True"):
        require_seed("seed", True, bits)


def test_a_bool_is_no_number() -> None:
    require_bool("flag", False)
    require_bool("flag", None, optional=True)
    with pytest.raises(ArgumentTypeError, match="flag: expected a bool, got int 1"):
        require_bool("flag", 1)
    with pytest.raises(ArgumentTypeError, match="flag: expected a bool, got NoneType None"):
        require_bool("flag", None)


def test_an_odd_size_is_odd() -> None:
    assert require_odd("size", 3, 1, 5) is None
    with pytest.raises(ArgumentError, match="size: must be odd, got 4"):
        require_odd("size", 4, 1, 5)
    with pytest.raises(ArgumentError, match="size: must be at most 5, got 7"):
        require_odd("size", 7, 1, 5)
