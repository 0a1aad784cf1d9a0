"""Which versions of Triton kernels are left to: by version, and on the newest GPUs by kernel."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch

from fastvq.ops import dispatch


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    dispatch.why_no_triton.cache_clear()
    yield
    dispatch.why_no_triton.cache_clear()


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton is not installed (pip install fastvq[gpu])"),
        ((3, 5), "it needs Triton 3.6 or newer, 3.5 is installed"),
        ((3, 6), None),
        ((3, 10), None),
    ],
    ids=str,
)
def test_versions(version: tuple[int, ...] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_version", lambda: version)
    assert dispatch.why_no_triton() == reason


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ((3, 7), (10, 0), "it needs Triton 3.8 or newer, 3.7 is installed, for compute capability 10.0"),
        ((3, 6), (12, 0), "it needs Triton 3.8 or newer, 3.6 is installed, for compute capability 12.0"),
        ((3, 6), (9, 0), None),
        ((3, 8), (10, 0), None),
    ],
    ids=str,
)
def test_versions_on_the_newest_gpus(
    version: tuple[int, ...], capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_triton_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_a_gpu = types.SimpleNamespace(is_cuda=True, device="cuda:0")
    assert dispatch.sm100_reason(on_a_gpu) == reason
    assert dispatch.sm100_reason(torch.zeros(1)) is None
