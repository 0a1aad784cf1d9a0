"""The Python of docs/accelerate.md runs, its table is what is printed, and its options are those of the package."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate_cases import package

import fastvq
from fastvq.errors import AccelerationWarning
from fastvq.interop.quantizers.in_place import KINDS

pytestmark = pytest.mark.usefixtures("steady")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "accelerate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_code_runs_and_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    package("vector_quantize_pytorch")
    names: dict[str, Any] = {}
    with pytest.warns(AccelerationWarning, match="random .*stochastic_sample_codes"):
        exec(BLOCKS[0], names)
    assert names["x"].grad is not None
    exec(BLOCKS[1], names)
    (table,) = re.findall(r"^```\n(module .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert capsys.readouterr().out == table
    assert len(BLOCKS) == 2


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
