"""Memory of training beside its prediction, in a process of its own."""

from __future__ import annotations

import pytest

from bench.training import TRAINING, measure


@pytest.mark.parametrize("name", ["train-tiny-pixelcnn-b1024"])
def test_memory_of_a_fresh_process(name: str) -> None:
    memory = measure(next(case for case in TRAINING if case.id == name))
    assert memory.predicted is not None
    assert memory.predicted / 1.15 < memory.measured < 1.15 * memory.predicted
