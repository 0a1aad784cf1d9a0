"""A backend from outside the package is a file and a line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import refuses
from toys import backend

from fastvq.errors import ArgumentError, UnavailableError
from fastvq.ops import explain_backend, nearest_code, nearest_code_statistics
from fastvq.ops.nearest_code.backends import BACKENDS


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = BACKENDS.rows
    backend.register()
    yield
    BACKENDS.replace(before)


def test_it_runs_when_asked_for() -> None:
    x, codebook = torch.randn(100, 1), torch.randn(7, 1)
    expected = (x - codebook[:, 0]).abs().argmin(1)
    assert torch.equal(nearest_code(x, codebook, backend="sorted"), expected)
    assert torch.equal(nearest_code(x, codebook), expected)
    found = nearest_code_statistics(x, codebook, backend="sorted")
    assert torch.equal(found.counts, expected.bincount(minlength=7))


def test_it_is_explained_and_refused_by_its_own_reason() -> None:
    plane, line = (torch.zeros(1, 2), torch.zeros(1, 2)), (torch.zeros(1, 1), torch.zeros(1, 1))
    assert "sorted: it sorts points on a line, not in 2 dimensions" in explain_backend("nearest_code", *plane)
    assert "sorted: chosen: asked for" in explain_backend("nearest_code", *line, backend="sorted")
    with refuses(UnavailableError, "backend: 'sorted' was asked for but cannot run nearest_code here: it sorts points"):
        nearest_code(*plane, backend="sorted")


def test_names_are_taken_once() -> None:
    with refuses(ArgumentError, "backend: nearest_code has one named 'sorted' already"):
        backend.register()
    row = backend.Backend("another", backend.why_not, backend.Sorted)
    with refuses(ArgumentError, "before: expected one of 'cpp', 'sorted', 'torch', 'triton', got 'fast'"):
        BACKENDS.add(row, before="fast")


def test_operations_stay_functions_whatever_is_imported() -> None:
    code = """
import fastvq.ops.nearest_code.reference, fastvq.ops.causal_attention.blocks, fastvq.ops.draw.cpp
import fastvq.ops.ema_update.cpp
from fastvq import ops
import pickle
for name in ("nearest_code", "causal_attention", "draw", "ema_update"):
    function = getattr(ops, name)
    assert callable(function) and pickle.loads(pickle.dumps(function)) is function, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
