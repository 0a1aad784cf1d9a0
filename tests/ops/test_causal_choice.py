"""Which backend causal operations take on a GPU, asked with tensors that have no memory behind them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import refuses
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton_helpers import needs_triton

from fastvq.errors import UnavailableError
from fastvq.ops import causal_attention, causal_attention_reference, explain_backend
from fastvq.ops.causal_attention.backends import runs_on_library
from fastvq.ops.causal_conv.choice import derived_times
from fastvq.ops.grid import MASKS, Form, Mask


def on_gpu(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    with FakeTensorMode():
        return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


def layer(batch: int, channels: int, kernel: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x and weight of the second convolution of a gated block on 32 x 32 positions."""
    return on_gpu((batch, channels, 32, 32), (2 * channels, channels, kernel, kernel), dtype=dtype)


@needs_triton
@pytest.mark.parametrize("form", ["rows", "symmetric"])
def test_large_kernels_go_to_the_library_and_small_ones_to_triton(form: Form) -> None:
    lines = explain_backend("causal_conv2d", *layer(32, 256, 5), mask="strict", form=form).splitlines()
    assert lines[0].startswith("fused: chosen: ")
    assert "derived for the library's convolution" in lines[0]
    assert lines[1:] == ["triton: could run, not chosen", "torch: could run, not chosen"]
    lines = explain_backend("causal_conv2d", *layer(1, 64, 5), mask="inclusive", form=form).splitlines()
    assert lines[0].startswith("triton: chosen: ")
    assert lines[1:] == ["fused: could run, not chosen", "torch: could run, not chosen"]
    for batch in (1, 32):
        lines = explain_backend("causal_conv2d", *layer(batch, 256, 1), mask="inclusive", form=form).splitlines()
        assert lines[0] == "fused: chosen: one tap is a matrix product, the library's"
        assert lines[1:] == ["triton: could run, not chosen", "torch: could run, not chosen"]


@needs_triton
def test_a_backend_asked_for_is_taken_whatever_the_times() -> None:
    lines = explain_backend("causal_conv2d", *layer(32, 256, 5), backend="triton").splitlines()
    assert lines == ["fused: could run, not chosen", "triton: chosen: asked for", "torch: could run, not chosen"]


def test_float64_is_left_to_pytorch_on_a_gpu() -> None:
    lines = explain_backend("causal_conv2d", *layer(32, 256, 5, torch.float64)).splitlines()
    assert lines[2] == "torch: chosen: the first that can run"


def test_derived_times() -> None:
    """Of the figures in docs/numerics.md."""
    times = derived_times(*layer(32, 256, 5), mask="strict", form="rows")
    product = 2 * 32768 * 512 * 256 * 22
    assert times.triton == pytest.approx(product / (0.45 * 634e12) + 32768 * 768 * 2 / 4.2e12 + 4e-6)
    assert times.fused == pytest.approx(product / (0.85 * 634e12) + 3 * 32768 * 768 * 2 / 4.2e12 + 16e-6)


def heads(
    width: int = 64, value_width: int = 64, length: int = 1024, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    shape = (8, 4, length)
    return on_gpu((*shape, width), (*shape, width), (*shape, value_width), dtype=dtype)


def first_line(tensors: list[Tensor], **options: float) -> str:
    return explain_backend("causal_attention", *tensors, **options).splitlines()[0]


@needs_triton
def test_attention_goes_to_the_library_where_it_serves() -> None:
    assert first_line(heads()) == "sdpa: chosen: the first that can run"
    assert first_line(heads(dtype=torch.float32)) == "sdpa: chosen: the first that can run"
    for tensors, options, reason in (
        (heads(), {"dropout": 0.1}, "it drops weights, not logits"),
        (heads(value_width=32), {}, "it takes values as wide as keys, not 32 and 64"),
        (heads(length=1), {}, "it takes two positions or more, not 1"),
    ):
        lines = explain_backend("causal_attention", *tensors, **options).splitlines()
        assert lines[:2] == [f"sdpa: {reason}", "triton: chosen: the first that can run"]
    lines = explain_backend("causal_attention", *heads(dtype=torch.float64)).splitlines()
    assert lines[0] == "sdpa: it would hold all logits of float64"
    assert lines[2] == "torch: chosen: the first that can run"


def test_what_runs_in_front_of_the_registered_operation() -> None:
    assert runs_on_library(*heads(), 0.0, None)
    assert not runs_on_library(*heads(), 0.1, None)
    assert not runs_on_library(*heads(value_width=32), 0.0, None)
    assert not runs_on_library(*heads(), 0.0, "triton")
    assert runs_on_library(*heads(), 0.0, "torch")


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [3, 16, 33])
def test_attention_of_the_library_agrees(mask: Mask, length: int, dtype: torch.dtype) -> None:
    """Output and gradients, at most twice as far from float64 as the definition in the same type, beyond eight units of
    the terms that are added up: products of normal numbers, of size 1, rounded by the library in an order of its own.
    """
    tensors = [normal(2, 3, length, 8, seed=seed, dtype=dtype) for seed in range(4)]
    results = []
    for attend, kind in (
        (causal_attention_reference, torch.float64),
        (causal_attention_reference, dtype),
        (partial(causal_attention, backend="sdpa"), dtype),
    ):
        inputs = [tensor.to(kind).requires_grad_() for tensor in tensors[:3]]
        out = attend(*inputs, mask=mask)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, tensors[3].to(kind))])
    for name, want, peer, mine in zip(("out", "query", "key", "value"), *results, strict=True):
        assert mine.dtype == dtype
        rounding = 8 * torch.finfo(dtype).eps * max(1.0, float(want.abs().max()))
        error, theirs = ((value.double() - want).abs().max() for value in (mine, peer))
        assert error <= 2 * theirs + rounding, f"{name}: {error:.2e}, {theirs:.2e}"
    if mask == "strict":
        out, of_query, of_key, of_value = results[2]
        for zero in (out[:, :, 0], of_query[:, :, 0], of_key[:, :, -1], of_value[:, :, -1]):
            assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize(
    ("options", "width", "reason"),
    [({"dropout": 0.1}, 8, "it drops weights"), ({}, 5, "it takes values as wide as keys, not 5 and 8")],
    ids=["dropout", "width"],
)
def test_attention_of_the_library_is_refused_with_the_reason(
    options: dict[str, float], width: int, reason: str
) -> None:
    tensors = [normal(1, 2, 4, size, seed=0, dtype=torch.float32) for size in (8, 8, width)]
    with refuses(UnavailableError, f"backend: 'sdpa' was asked for but cannot run causal_attention here: {reason}"):
        causal_attention(*tensors, **options, backend="sdpa")
