"""Products that are summed in a fixed order: the same bits however a batch is split, and values of a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq import _engine
from fastvq._product import Product

pytestmark = [
    pytest.mark.skipif(not _engine.available(), reason="needs the extension"),
    pytest.mark.usefixtures("steady"),
]

# Rows, columns and channels of a window, columns of weights, positions.
SHAPES = [(4, 5, 64, 128, 32), (1, 1, 33, 7, 5), (2, 3, 21, 50, 1), (3, 2, 300, 17, 9), (4, 5, 64, 64, 4)]
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
STARTS = ["none", "bias", "samples", "positions", "out"]


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def history(samples: int, rows: int, columns: int, channels: int) -> Tensor:
    """A part of a larger one, which is NaN elsewhere."""
    ring = poisoned(samples, rows + 3, columns + 4, channels)
    part = ring[:, 2 : 2 + rows, 1 : 1 + columns]
    part.normal_()
    return part


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """[B, W, N] in the precision of x."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1))[:, :, 0].transpose(1, 2)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@EACH_SHAPE
@pytest.mark.parametrize("start_kind", STARTS)
def test_values_and_bits(shape: tuple[int, ...], start_kind: str) -> None:
    rows, taps, channels, columns, width = shape
    samples, depth = 7, rows * taps * channels
    weight = torch.randn(rows, taps, channels, columns)
    x = history(samples, rows, width + taps - 1, channels)
    before = torch.randn(samples, width, columns)
    start = {"bias": before[0, 0], "samples": before[:, :1], "positions": before[0]}.get(start_kind)
    product = Product([weight])

    def run(chosen: slice, threads: int | None = None) -> Tensor:
        part = x[chosen]
        # Rows of a larger tensor, so that what lies beside them shows whether it was written to.
        wide = poisoned(len(part), width + 1, columns + 3)
        out = wide[:, :width, 1 : 1 + columns]
        begin = start
        if start_kind == "out":
            begin = out.copy_(before[chosen])
        elif start_kind == "samples":
            begin = before[chosen, :1]
        assert product([part], out, begin, threads=threads) is out
        around = wide.clone()
        around[:, :width, 1 : 1 + columns] = torch.nan
        assert around.isnan().all()
        return out

    out = run(slice(None))
    base = before if start_kind == "out" else torch.zeros(()) if start is None else start
    exact = convolved(x.double(), weight.double()) + base.double()
    scale = convolved(x.double().abs(), weight.double().abs()) + base.double().abs()
    assert ((out - exact).abs() <= (depth + 1) * 2**-24 * scale).all()
    library = convolved(x, weight) + base
    assert (out - exact).abs().max() <= 8 * (library - exact).abs().max() + 1e-6
    for first, last in [(0, 1), (1, 3), (3, 7), (6, 7)]:
        assert same_bits(run(slice(first, last)), out[first:last])
    for threads in (2, 3, 7):
        assert same_bits(run(slice(None), threads), out)


def test_several_inputs_follow_each_other() -> None:
    """As if the second were more channels of the first, where that has a single row and column."""
    left, right = torch.randn(5, 1, 6, 20), torch.randn(5, 1, 6, 13)
    weights = torch.randn(1, 1, 20, 40), torch.randn(1, 1, 13, 40)
    out = Product(weights)([left, right], poisoned(5, 6, 40))
    joined = Product([torch.cat(weights, 2)])([torch.cat([left, right], 3)], poisoned(5, 6, 40))
    assert same_bits(out, joined)


def test_windows_of_some_channels() -> None:
    whole, weight = torch.randn(3, 2, 10, 24), torch.randn(2, 4, 11, 30)
    some = whole[..., 5:16]
    product = Product([weight])
    assert same_bits(product([some], poisoned(3, 7, 30)), product([some.contiguous()], poisoned(3, 7, 30)))


def test_instruction_sets() -> None:
    weight, x = torch.randn(4, 5, 40, 70), torch.randn(3, 4, 14, 40)
    seen: dict[bool, Tensor] = {}
    for name in ("avx512", "avx2", "baseline"):
        try:
            product = Product([weight], name)
        except ValueError:
            continue  # not on this processor
        out = product([x], poisoned(3, 10, 70))
        assert same_bits(seen.setdefault(product.fused, out), out)
        assert torch.allclose(out, convolved(x, weight), rtol=0, atol=2e-4)
    assert seen


def test_positions_before_samples() -> None:
    weight, x = torch.randn(1, 2, 8, 20), torch.randn(3, 1, 6, 8)
    out = poisoned(5, 3, 20)
    product = Product([weight])
    product([x], out.transpose(0, 1))
    assert same_bits(out.transpose(0, 1).contiguous(), product([x], poisoned(3, 5, 20)))


def test_no_samples() -> None:
    out = Product([torch.randn(1, 1, 4, 3)])([torch.empty(0, 1, 5, 4)], torch.empty(0, 5, 3))
    assert out.shape == (0, 5, 3)


def test_size_of_packed_weights() -> None:
    product = Product([torch.randn(2, 2, 8, 3)])
    assert product.weight_bytes >= 4 * 32 * 3


def test_what_does_not_fit() -> None:
    with pytest.raises(AssertionError, match="as many columns"):
        Product([torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 5)])
    with pytest.raises(AssertionError, match="weights: expected torch.float32"):
        Product([torch.randn(1, 1, 4, 3).double()])
    with pytest.raises(ValueError, match="kernels"):
        Product([torch.randn(1, 1, 4, 3)], "none")
    product = Product([torch.randn(2, 3, 4, 5)])
    x, out = torch.randn(6, 2, 9, 4), torch.empty(6, 7, 5)
    product([x], out)
    with pytest.raises(AssertionError, match="1 inputs and 5 columns"):
        product([x, x], out)
    with pytest.raises(AssertionError, match="1 inputs and 5 columns"):
        product([x], torch.empty(6, 7, 6))
    for wrong in (x[:5], x[:, :1], x[:, :, 1:], x[..., 1:], x.double(), x.mT.contiguous().mT, x.to("meta")):
        with pytest.raises(AssertionError, match="input: expected torch.float32"):
            product([wrong], out)
    for wrong in (out.double(), out.mT.contiguous().mT):
        with pytest.raises(AssertionError, match="out: expected torch.float32"):
            product([x], wrong)
    gaps = torch.randn(6, 7, 5).mT.contiguous().mT
    for wrong in (torch.randn(4), torch.randn(5).double(), torch.randn(10)[::2], gaps):
        with pytest.raises(AssertionError, match="start: expected torch.float32"):
            product([x], out, wrong)
    for shared in (torch.empty(6, 1, 5).expand(6, 7, 5), torch.empty(1, 7, 5).expand(6, 7, 5)):
        with pytest.raises(ValueError, match="rows that do not overlap"):
            product([x], shared)
    with pytest.raises(ValueError, match="threads"):
        product([x], out, threads=0)


def test_the_extension_checks_again() -> None:
    native = _engine.require().make_product(torch.randn(4, 3).data_ptr(), 4, 3, "auto")
    x, out = torch.randn(4), torch.empty(3)
    good = [x.data_ptr(), 4, 4, 4, 1, 4]
    tail = (0, 0, 0, out.data_ptr(), 3, 3, 1)
    native.run(1, 1, good, *tail)
    for inputs, message in [
        ([], "make up the depth"),
        (good + good, "make up the depth"),
        (good[:-1], "6 numbers"),
        ([0, *good[1:]], "input"),
        ([good[0] + 1, *good[1:]], "input"),
        ([*good[:4], 0, 4], "runs"),
        ([*good[:4], 1, 0], "length"),
        ([*good[:4], 1, 2], "make up the depth"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.run(1, 1, inputs, *tail)
    for samples, width in [(-1, 1), (1, 0)]:
        with pytest.raises(ValueError, match="samples|width"):
            native.run(samples, width, good, *tail)
    with pytest.raises(ValueError, match="out"):
        native.run(1, 1, good, 0, 0, 0, 0, 3, 3, 1)
    for depth, columns in [(0, 3), (4, 0), (1 << 40, 3)]:
        with pytest.raises(ValueError, match="depth|columns"):
            _engine.require().make_product(x.data_ptr(), depth, columns, "auto")
