"""The tables of docs/accelerate.md name what the package knows, and options that there are."""

from __future__ import annotations

import inspect
import re

from accelerate_cases import package
from page_blocks import ROOT

import fastvq
from fastvq.interop.quantizers.in_place import KINDS

PAGE = (ROOT / "docs" / "accelerate.md").read_text(encoding="utf-8")


def test_every_kind_is_in_the_table() -> None:
    missing = [name for kind in KINDS for name in kind.classes if f"`{name}`" not in PAGE]
    assert missing == []


def test_the_options_are_options() -> None:
    vq = package("vector_quantize_pytorch")
    for name in ("VectorQuantize", "ResidualVQ"):
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| vector-quantize-pytorch `{name}`")]
        options = {*inspect.signature(vq.VectorQuantize).parameters, *inspect.signature(getattr(vq, name)).parameters}
        assert {*re.findall(r"`(\w+)`", row.split("|")[3])} <= options


def test_the_names_are_there() -> None:
    for name in re.findall(r"fastvq\.(\w+)\(", PAGE):
        assert callable(getattr(fastvq, name))
