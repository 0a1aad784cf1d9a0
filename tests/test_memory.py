"""Addresses for compiled code: refused unless type, number of elements, layout and device are what was promised."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvq
from fastvq._memory import address, array_address, strided_address

CPU = torch.device("cpu")
WRONG: dict[str, Callable[[], Tensor]] = {
    "type": lambda: torch.zeros(3, 4, dtype=torch.float64),
    "fewer": lambda: torch.zeros(3, 3),
    "more": lambda: torch.zeros(4, 4),
    "columns": lambda: torch.zeros(4, 3).T,
    "gaps": lambda: torch.zeros(3, 8)[:, ::2],
    "expanded": lambda: torch.zeros(3, 1).expand(3, 4),
    "device": lambda: torch.zeros(3, 4, device="meta"),
}


def test_addresses() -> None:
    tensor, array = torch.zeros(3, 4), np.zeros((3, 4))
    assert address("x", tensor, torch.float32, 12) == tensor.data_ptr()
    assert address("x", tensor[1:], torch.float32, 8, CPU) == tensor.data_ptr() + 16
    assert array_address("x", array, np.float64, 12) == array.ctypes.data
    # A device without an index is any of its type.
    meta = torch.zeros(3, device="meta")
    assert address("x", meta, torch.float32, 3, torch.device("meta")) == meta.data_ptr()


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors(kind: str) -> None:
    with pytest.raises(AssertionError, match=r"^x: expected torch.float32 12 elements without gaps on cpu, got "):
        address("x", WRONG[kind](), torch.float32, 12)


@pytest.mark.parametrize("kind", ["type", "fewer", "more", "columns", "gaps", "expanded", "device"])
def test_wrong_strided_tensors(kind: str) -> None:
    with pytest.raises(AssertionError, match=r"^x: expected torch.float32 \[3, 4\] without gaps along its end on cpu"):
        strided_address("x", WRONG[kind](), torch.float32, (3, 4))


def test_strided_tensors_may_have_gaps_between_vectors() -> None:
    rows = torch.zeros(3, 8)[:, 2:6]
    assert strided_address("x", rows, torch.float32, (3, 4)) == rows.data_ptr()
    single = torch.zeros(3, 8)[:, ::8]
    assert strided_address("x", single, torch.float32, (3, 1)) == single.data_ptr()


@pytest.mark.parametrize("array", [np.zeros(12, np.float32), np.zeros(11), np.zeros((3, 8))[:, ::2]])
def test_wrong_arrays(array: np.ndarray) -> None:
    with pytest.raises(AssertionError, match=r"^x: expected float64 12 elements without gaps"):
        array_address("x", array, np.float64, 12)


def test_no_other_module_hands_addresses_over() -> None:
    """Others may look at addresses, to see whether a tensor is still the same one, or how it is aligned."""
    root = Path(fastvq.__file__).parent
    taken = re.compile(r"\.data_ptr\(\)|\.ctypes\.data\b")
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if taken.search(path.read_text("utf-8"))}
    assert found == {"_memory.py", "_watch.py", "models/pretrained.py", "models/quantizer/update.py"}
