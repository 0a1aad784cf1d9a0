"""The reference names every public name, once."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
from page_blocks import ROOT

import fastvq
from fastvq import errors

REFERENCE = ROOT / "docs" / "api"
PUBLIC = (
    "fastvq",
    "fastvq.data",
    "fastvq.evaluation",
    "fastvq.interop",
    "fastvq.interop.quantizers",
    "fastvq.models",
    "fastvq.models.quantizer",
    "fastvq.ops",
    "fastvq.sampling",
    "fastvq.training",
)
NAMED = [
    name
    for path in sorted(REFERENCE.glob("*.rst"))
    for name in re.findall(
        r"^ *\.\. (?:auto)?(?:py:)?(?:class|data|exception|function):: ([\w.]+)$",
        path.read_text(encoding="utf-8"),
        re.M,
    )
]


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_in_the_reference_once(module: str) -> None:
    """Under this path, or under another that leads to the same."""
    documented = [(name, found(name)) for name in NAMED]
    times = {}
    for name in importlib.import_module(module).__all__:
        path, value = f"{module}.{name}", found(f"{module}.{name}")
        times[path] = sum(other == path or thing is value for other, thing in documented)
    assert {path: count for path, count in times.items() if count != 1} == {}


def test_errors_are_in_the_reference_once() -> None:
    own = {
        name for name, thing in vars(errors).items() if inspect.isclass(thing) and thing.__module__ == errors.__name__
    }
    named = [name.rpartition(".")[2] for name in NAMED if name.startswith("fastvq.errors.")]
    assert sorted(named) == sorted(own)


def test_what_is_named_is_there() -> None:
    assert len(NAMED) == len({*NAMED}) > 100
    for name in NAMED:
        found(name)


def test_rooms_are_public() -> None:
    """A room of the package that users reach as an attribute has its names in the reference."""
    rooms = {f"fastvq.{name}" for name in fastvq._ROOMS} - {"fastvq.distributed", "fastvq.errors"}
    assert rooms == {name for name in PUBLIC if name.count(".") == 1}
