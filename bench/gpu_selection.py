"""A pytest plugin (``-p bench.gpu_selection``) that leaves only the tests that need a GPU.

These are tests whose name says ``on_a_gpu`` or which are marked to be skipped for a reason that speaks of a GPU,
whether or not there is one now.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# What the text of a test file with such tests contains.
_SIGNS = re.compile(r"on_a_gpu|needs_gpu|cuda\.is_available")


def needs_gpu(item: pytest.Item) -> bool:
    """Whether a test is one that needs a GPU."""
    if "on_a_gpu" in item.name:
        return True
    reasons = (str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif"))
    return any(re.search(r"\bGPU\b", reason) for reason in reasons)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not needs_gpu(item)]
    items[:] = [item for item in items if needs_gpu(item)]
    if others:
        config.hook.pytest_deselected(items=others)


def files(folder: Path) -> list[Path]:
    """Test files that may hold such tests; the others need not be imported."""
    return [path for path in sorted(folder.glob("test_*.py")) if _SIGNS.search(path.read_text())]
