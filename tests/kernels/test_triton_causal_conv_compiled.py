"""The Triton kernels of the masked convolution, compiled for three chips as they would be launched."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from triton_helpers import Launch, Recorder, assert_fits, needs_compiler, needs_triton


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from fastvq.kernels import causal_conv_product, causal_conv_taps, causal_conv_weight, causal_surroundings

    found: list[Launch] = []
    for module in (causal_conv_product, causal_conv_taps, causal_conv_weight, causal_surroundings):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(value, found))
    return found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device="meta")
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


def joined(make: Callable[..., Tensor], gate: bool) -> None:
    """The kernels around the library's convolutions of such a layer, forward and backward."""
    from fastvq.kernels import causal_surroundings as kernels

    x, wide = make(32, 256, 64, 64), make(32, 512, 64, 64)
    whole, upper, current = kernels.Layout(64, 64), kernels.Layout(67, 64, 4, 0), kernels.Layout(64, 65, 0, 2)
    kernels.spread(x, 2 if gate else 1, (upper, current), 512 if gate else 256, x.dtype)
    if gate:
        around = kernels.Surroundings(make(512), wide, x, True)
        kernels.join(x, ((wide, whole), (wide, whole)), 512, around, wide)
        parts = tuple((make(32, 512, lay.rows, lay.columns), lay) for lay in (upper, current))
        kernels.join(x, parts, 512, kernels.Surroundings(given=x, derivative=2))
    else:
        kernels.join(x, ((x, whole),), 256, kernels.Surroundings(make(256)))


def autocast() -> None:
    """The same of a layer of float32 that multiplies bfloat16, of odd widths that are filled up."""
    from fastvq.kernels import causal_conv_taps
    from fastvq.kernels import causal_surroundings as kernels

    half, single = torch.bfloat16, torch.float32
    x, before, whole = meta(32, 257, 64, 64, dtype=single), meta(32, 514, 64, 64), kernels.Layout(64, 64)
    kernels.spread(x, 1, (whole,), 272, half)
    around = kernels.Surroundings(meta(514, dtype=single), None, x, True)
    kernels.join(x, ((meta(32, 528, 64, 64), whole),), 528, around, before)
    kernels.begin_backward(x, before, 528, half, summed=True)
    kernels.begin_backward(x, None, 272, half, summed=False)
    kernels.begin_backward(x, None, 257, single, summed=True)
    weight = meta(514, 257, 1, 1, dtype=single).contiguous()
    packed = causal_conv_taps.pack(weight, (1,), 528, 272, half)
    causal_conv_taps.unpack((packed,), (1,), 272, meta(528, 514, dtype=single), weight)


def taps(make: Callable[..., Tensor]) -> None:
    """Taking taps out of weights, and bringing their gradients back."""
    from fastvq.kernels import causal_conv_taps

    weight, sums = make(512, 256, 5, 5).contiguous(), meta(528, 512, dtype=torch.float32)
    packed = causal_conv_taps.pack(weight, (20, 2), 512, 256, weight.dtype)
    causal_conv_taps.unpack((packed, packed), (20, 2), 256, sums, weight)


def launch(kind: str, dtype: torch.dtype, precision: str) -> None:
    """A layer of 256 channels on a batch of 32 grids of 64 x 64, or what ``kind`` says instead."""
    from fastvq.kernels import causal_conv as kernels

    make = partial(meta, dtype=dtype)
    x, wide = make(32, 256, 64, 64), make(32, 512, 64, 64)
    symmetric = {"mask": "strict", "form": "symmetric", "precision": precision}
    pointwise = {"mask": "inclusive", "form": "rows", "activation": "concat_elu", "precision": precision}
    if kind == "plain":
        kernels.forward(x, make(256, 256, 5, 5), make(256), **symmetric)
    elif kind == "gated":
        given = {"context": wide, "residual": x, "gate": True, "keep_pre_gate": True}
        kernels.forward(x, make(512, 256, 5, 5), make(512), **symmetric, **given)
    elif kind == "pointwise":
        kernels.forward(x, make(512, 512, 1, 1), make(512), **pointwise, residual=x, gate=True, keep_pre_gate=True)
    elif kind == "small":
        kernels.forward(make(2, 20, 8, 8), make(20, 20, 3, 3), make(20), **symmetric)
    elif kind == "single":
        # Triton makes a constant of every argument that is 1.
        single = make(1, 1, 1, 1)
        kernels.forward(single, make(2, 1, 2, 2), make(2), **symmetric, gate=True, keep_pre_gate=True)
        kernels.backward_input(single, single, make(1, 2, 3, 3), **symmetric, activation="concat_elu")
        kernels.backward_weight(single, single, kernel_size=2, **symmetric)
        kernels.gate_backward(single, make(1, 2, 1, 1))
    elif kind == "of-input":
        kernels.backward_input(x, x, make(256, 512, 5, 5), **symmetric, activation="concat_elu")
    elif kind == "of-weight":
        kernels.backward_weight(x, x, kernel_size=5, **symmetric)
    elif kind == "of-pointwise":
        kernels.backward_weight(x, x, kernel_size=1, **pointwise)
    elif kind == "of-gate":
        kernels.gate_backward(x, wide)
    elif kind == "autocast":
        autocast()
    elif kind == "taps":
        taps(make)
    elif kind in ("joined", "joined-gate"):
        joined(make, gate=kind == "joined-gate")
    else:
        raise AssertionError(kind)


COMPILED = [
    *itertools.product(("gated", "of-weight"), ("bfloat16", "tf32", "ieee"), (80, 90, 100)),
    *itertools.product(("pointwise", "of-input"), ("bfloat16",), (90, 100)),
    ("of-pointwise", "bfloat16", 90),
    ("pointwise", "float16", 80),
    ("small", "bfloat16", 80),
    ("small", "ieee", 90),
    ("single", "bfloat16", 90),
    *itertools.product(("of-gate", "joined", "joined-gate", "taps", "autocast"), ("bfloat16",), (80, 90, 100)),
    *itertools.product(("joined-gate", "taps"), ("float16", "ieee"), (90,)),
]


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("kind", "precision", "capability"), COMPILED)
def test_compiled_kernels_fit_the_chip(
    kind: str, precision: str, capability: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles that are chosen for these layers, on chips of 132 multiprocessors."""
    from fastvq.kernels import causal_conv_product, causal_conv_weight, causal_surroundings

    for module in (causal_conv_product, causal_conv_weight, causal_surroundings):
        monkeypatch.setattr(module, "hardware", lambda device: causal_conv_product.Device(capability, 132))
    launch(kind, getattr(torch, precision, torch.float32), precision if precision == "tf32" else "ieee")
    assert launches
    for found in launches:
        resources = found.compile(capability)
        if precision == "ieee":
            # Nothing approximate, and a sum of its own for every block of depth: 32 of a thread's, or 16 pairs.
            assert "ex2.approx" not in resources.ptx
            assert "PRECISION" not in found.options or len(re.findall(r"\badd(?:\.rn)?\.f32", resources.ptx)) >= 16
        assert_fits(resources, capability)
        if "PRECISION" in found.options:
            # Copies run ahead of the products.
            assert "cp.async" in resources.ptx
            if precision != "ieee" and kind != "single":
                fast = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
                assert fast in resources.ptx
