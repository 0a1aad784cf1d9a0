"""Causal convolution, convolution of codes and causal attention against explicit loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random_codes, refuses
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.ops import causal_attention, causal_conv2d, code_conv2d
from fastvq.ops.grid import FORMS, MASKS, Form, Mask

pytestmark = pytest.mark.usefixtures("steady")

NAN = math.nan
GRIDS = [(1, 1), (1, 7), (6, 1), (4, 5)]

each_mask = pytest.mark.parametrize("mask", MASKS)
each_form = pytest.mark.parametrize("form", FORMS)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def offsets(kernel: int, form: Form) -> list[tuple[int, int]]:
    """Row and column offset of every tap of the stored kernel, in its order."""
    rows = range(1 - kernel, 1) if form == "rows" else range(-(kernel // 2), kernel - kernel // 2)
    columns = range(-(kernel // 2), kernel - kernel // 2)
    return list(itertools.product(rows, columns))


def is_read(row: int, column: int, mask: Mask) -> bool:
    return row < 0 or (row == 0 and (column < 0 or (column == 0 and mask == "inclusive")))


def read_taps(kernel: int, mask: Mask, form: Form) -> Tensor:
    """bool [k, k]: which entries of a kernel may be read."""
    return torch.tensor([is_read(row, column, mask) for row, column in offsets(kernel, form)]).view(kernel, kernel)


def shifted(x: Tensor, row: int, column: int) -> Tensor:
    """[B, C, H, W] whose position (r, c) holds x at (r + row, c + column), or 0 outside."""
    height, width = x.shape[2:]
    reach = max(abs(row), abs(column))
    padded = F.pad(x, (reach,) * 4)
    return padded[:, :, reach + row : reach + row + height, reach + column : reach + column + width]


def masked_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask, form: Form) -> Tensor:
    kernel = weight.shape[-1]
    (top, left), (bottom, right) = offsets(kernel, form)[0], offsets(kernel, form)[-1]
    patches = F.pad(x, (-left, right, -top, bottom)).unfold(2, kernel, 1).unfold(3, kernel, 1)
    read = read_taps(kernel, mask, form)
    out = torch.einsum("oct,bchwt->bohw", weight[:, :, read], patches[..., read])
    return out if bias is None else out + bias[:, None, None]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed weighted sum of the output; zeros where the output does not depend on an input."""
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(out, inputs, normal(*out.shape, seed=9), materialize_grads=True))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@each_grid
@each_form
@each_mask
@pytest.mark.parametrize("kernel", range(1, 8))
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_convolution_equals_loop(kernel: int, mask: Mask, form: Form, biased: bool, grid: tuple[int, int]) -> None:
    tensors = [normal(2, 3, *grid), normal(4, 3, kernel, kernel, seed=1), *([normal(4, seed=2)] if biased else [])]
    mine, theirs = leaves(*tensors), leaves(*tensors)
    out = causal_conv2d(mine[0], mine[1], mine[2] if biased else None, mask=mask, form=form)
    want = masked_convolution(theirs[0], theirs[1], theirs[2] if biased else None, mask, form)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for name, grad, expected in zip(
        ("x", "weight", "bias"), gradients(out, mine), gradients(want, theirs), strict=False
    ):
        torch.testing.assert_close(
            grad, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@each_form
@each_mask
@pytest.mark.parametrize("kernel", [2, 3])
def test_convolution_gradcheck(kernel: int, mask: Mask, form: Form) -> None:
    x, weight, bias = leaves(normal(1, 1, 3, 2), normal(1, 1, kernel, kernel, seed=1), normal(1, seed=2))
    assert torch.autograd.gradcheck(lambda *args: causal_conv2d(*args, mask=mask, form=form), (x, weight, bias))


@pytest.mark.parametrize("batch", [0, 1])
def test_convolution_of_small_batches(batch: int) -> None:
    mine, theirs = (leaves(normal(batch, 2, 3, 4), normal(3, 2, 3, 3, seed=1)) for _ in range(2))
    out, want = causal_conv2d(*mine), masked_convolution(*theirs, None, "strict", "rows")
    assert out.shape == (batch, 3, 3, 4)
    for mine_grad, their_grad in zip(gradients(out, mine), gradients(want, theirs), strict=True):
        torch.testing.assert_close(mine_grad, their_grad, rtol=1e-12, atol=1e-12)


@each_mask
def test_convolution_of_strided_memory(mask: Mask) -> None:
    x, weight = normal(5, 4, 3, 2).permute(3, 2, 1, 0), normal(3, 3, 6, 4, seed=1)[:, :, ::2, :3].transpose(0, 1)
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    want = masked_convolution(x, weight, None, mask, "symmetric")
    torch.testing.assert_close(causal_conv2d(x, weight, mask=mask, form="symmetric"), want, rtol=1e-12, atol=1e-12)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        causal_conv2d(channels_last, weight, mask=mask, form="symmetric"), want, rtol=1e-12, atol=1e-12
    )


@each_form
@each_mask
def test_convolution_in_float32_is_as_accurate_as_a_dense_one(mask: Mask, form: Form) -> None:
    x, weight = normal(2, 32, 8, 9), normal(16, 32, 5, 5, seed=1)
    want = masked_convolution(x, weight, None, mask, form)
    above = 4 if form == "rows" else 2
    dense = F.conv2d(
        F.pad(x.float(), (2, 2, above, 4 - above)), torch.where(read_taps(5, mask, form), weight, 0).float()
    )
    error = (causal_conv2d(x.float(), weight.float(), mask=mask, form=form).double() - want).abs().max()
    assert error <= 2 * (dense.double() - want).abs().max()


@each_form
@each_mask
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_masked_weights_are_never_read(kernel: int, mask: Mask, form: Form) -> None:
    read = read_taps(kernel, mask, form)
    # A kernel of 2 ends at the current position, so inclusive masks leave nothing out.
    assert (~read).any() == (kernel > 2 or mask == "strict")
    x, weight, bias = leaves(normal(2, 3, 5, 6), normal(4, 3, kernel, kernel, seed=1), normal(4, seed=2))
    with torch.no_grad():
        clean = causal_conv2d(x, weight, bias, mask=mask, form=form)
        weight[:, :, ~read] = NAN
    out = causal_conv2d(x, weight, bias, mask=mask, form=form)
    assert torch.equal(out, clean)
    of_x, of_weight, of_bias = gradients(out, [x, weight, bias])
    assert of_x.isfinite().all()
    assert of_bias.isfinite().all()
    assert (of_weight[:, :, ~read] == 0).all()
    assert (of_weight[:, :, read] != 0).any(dim=(0, 1)).all()


@each_form
@each_mask
@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_later_positions_are_never_read(kernel: int, mask: Mask, form: Form, dtype: torch.dtype) -> None:
    x, weight = normal(2, 3, 4, 5, dtype=dtype), normal(2, 3, kernel, kernel, seed=1, dtype=dtype)
    clean = causal_conv2d(x, weight, mask=mask, form=form).flatten(2)
    for position in range(20):
        poisoned = x.clone()
        poisoned.flatten(2)[:, :, position:] = NAN
        out = causal_conv2d(poisoned, weight, mask=mask, form=form).flatten(2)
        free = position + (mask == "strict")
        assert torch.equal(out[:, :, :free], clean[:, :, :free])
        assert out[:, :, free:].isnan().any() == (free < 20)


@each_form
@each_mask
def test_current_position_is_read_by_inclusive_masks_alone(mask: Mask, form: Form) -> None:
    x, weight = normal(1, 2, 3, 4), normal(2, 2, 3, 3, seed=1)
    clean = causal_conv2d(x, weight, mask=mask, form=form).flatten(2)
    for position in range(12):
        changed = x.clone()
        changed.flatten(2)[:, :, position] += 1
        moved = (causal_conv2d(changed, weight, mask=mask, form=form).flatten(2) != clean).any(dim=1)[0]
        assert moved[position] == (mask == "inclusive")
        assert not moved[:position].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": "loose"}, ArgumentError, "mask: expected one of 'strict', 'inclusive'"),
        ({"form": "columns"}, ArgumentError, "form: expected one of 'rows', 'symmetric'"),
        ({"x": torch.zeros(2, 4, 5)}, ArgumentError, "x: expected shape"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, ArgumentError, "weight: expected shape"),
        ({"weight": torch.zeros(4, 3, 2, 3)}, ArgumentError, "weight: expected a square kernel"),
    ],
    ids=["mask", "form", "x-3d", "weight-channels", "weight-oblong"],
)
def test_convolution_refuses(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    call = {"x": torch.zeros(1, 3, 4, 5), "weight": torch.zeros(4, 3, 3, 3), **arguments}
    with refuses(error, message):
        causal_conv2d(**call)


TAPS = {
    "causal": [(-1, -1), (-1, 0), (-1, 1), (0, -1)],
    "centred": list(itertools.product((-1, 0, 1), repeat=2)),
    "later-only": [(1, 0), (2, 3)],
    "twice-the-same": [(0, -2), (0, -2)],
    "farther-than-the-grid": [(-9, 0), (0, 9), (0, 0)],
}


@each_grid
@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS.keys())
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_code_convolution_equals_one_hot(taps: list[tuple[int, int]], biased: bool, grid: tuple[int, int]) -> None:
    codes = random_codes(2, *grid)
    tensors = [normal(len(taps), 5, 3), *([normal(3, seed=1)] if biased else [])]
    mine, theirs = leaves(*tensors), leaves(*tensors)
    out = code_conv2d(codes, mine[0], taps, mine[1] if biased else None)
    one_hot = F.one_hot(codes, 5).double().movedim(-1, 1)
    want = one_hot.new_zeros(2, 3, *grid) if not biased else theirs[1][:, None, None].expand(2, 3, *grid)
    for row, matrix in zip(taps, theirs[0], strict=True):
        want = want + F.conv2d(shifted(one_hot, *row), matrix.T[:, :, None, None])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for grad, expected in zip(gradients(out, mine), gradients(want, theirs), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_code_convolution_gradcheck() -> None:
    table, bias = leaves(normal(4, 5, 2), normal(2, seed=1))
    codes = random_codes(1, 2, 3)
    assert torch.autograd.gradcheck(lambda t, b: code_conv2d(codes, t, TAPS["causal"], b), (table, bias))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_code_convolution_takes_any_integers(dtype: torch.dtype) -> None:
    codes, table = random_codes(2, 3, 4), normal(4, 5, 2)
    want = code_conv2d(codes, table, TAPS["causal"])
    assert torch.equal(code_conv2d(codes.to(dtype), table, TAPS["causal"]), want)


def test_code_convolution_of_an_empty_batch() -> None:
    table = normal(4, 5, 2).requires_grad_()
    out = code_conv2d(torch.zeros(0, 3, 4, dtype=torch.int64), table, TAPS["causal"])
    assert out.shape == (0, 2, 3, 4)
    assert (gradients(out, [table])[0] == 0).all()


@pytest.mark.parametrize(
    ("codes", "table", "error", "message"),
    [
        (torch.full((1, 2, 2), 5), torch.zeros(4, 5, 2), ArgumentError, "codes: values must lie in 0..4, got 5"),
        (torch.full((1, 2, 2), -1), torch.zeros(4, 5, 2), ArgumentError, "codes: values must lie in 0..4, got -1"),
        (torch.zeros(1, 2, 2), torch.zeros(4, 5, 2), ArgumentTypeError, "codes: expected an integer tensor"),
        (torch.zeros(2, 2).long(), torch.zeros(4, 5, 2), ArgumentError, "codes: expected shape"),
        (torch.zeros(1, 2, 2).long(), torch.zeros(3, 5, 2), ArgumentError, "table: expected shape"),
    ],
    ids=["too-large", "negative", "float", "2d", "table-of-other-taps"],
)
def test_code_convolution_refuses(codes: Tensor, table: Tensor, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        code_conv2d(codes, table, TAPS["causal"])


def attention_loop(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    rows = []
    for i in range(query.shape[2]):
        seen = i + (mask == "inclusive")
        if seen == 0:
            rows.append(value.new_zeros(*value.shape[:2], value.shape[3]))
            continue
        scores = (query[:, :, i : i + 1] * key[:, :, :seen]).sum(-1) / query.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * value[:, :, :seen]).sum(2))
    return torch.stack(rows, dim=2) if rows else value * 1


@each_mask
@pytest.mark.parametrize("length", [0, 1, 2, 7])
@pytest.mark.parametrize("value_width", [3, 5])
@pytest.mark.parametrize("batch", [0, 2])
def test_attention_equals_loop(mask: Mask, length: int, value_width: int, batch: int) -> None:
    shape = (batch, 2, length, 3)
    tensors = [normal(*shape), normal(*shape, seed=1), normal(*shape[:3], value_width, seed=2)]
    mine, theirs = leaves(*tensors), leaves(*tensors)
    out, want = causal_attention(*mine, mask=mask), attention_loop(*theirs, mask)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for grad, expected in zip(gradients(out, mine), gradients(want, theirs), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


@each_mask
def test_attention_gradcheck(mask: Mask) -> None:
    inputs = leaves(normal(1, 2, 4, 2), normal(1, 2, 4, 2, seed=1), normal(1, 2, 4, 3, seed=2))
    assert torch.autograd.gradcheck(lambda *args: causal_attention(*args, mask=mask), inputs)


def test_strict_attention_gives_zeros_to_the_first_position() -> None:
    query, key, value = leaves(*(normal(2, 2, 5, 3, seed=seed) for seed in range(3)))
    out = causal_attention(query, key, value)
    assert (out[:, :, 0] == 0).all()
    of_query, of_key, of_value = gradients(out, [query, key, value])
    assert (of_query[:, :, 0] == 0).all()
    assert (of_key[:, :, -1] == 0).all()
    assert (of_value[:, :, -1] == 0).all()
    assert (of_query[:, :, 2:] != 0).any(-1).all()


@each_mask
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_later_keys_and_values_are_never_read(mask: Mask, dropout: float, dtype: torch.dtype) -> None:
    tensors = [normal(2, 2, 9, 4, seed=seed, dtype=dtype) for seed in range(3)]

    def attend() -> Tensor:
        torch.manual_seed(0)
        return causal_attention(*tensors, mask=mask, dropout=dropout)

    before = attend()
    for position in range(8, -1, -1):
        # 1e4 rather than NaN: a weight of exactly 0 still multiplies the value.
        tensors[1][:, :, position] = 1e4
        tensors[2][:, :, position] = -1e4
        after = attend()
        free = position + (mask == "strict")
        assert torch.equal(after[:, :, :free], before[:, :, :free])
        assert position == 8 or (after[:, :, free:] != before[:, :, free:]).any()


def test_attention_dropout_drops_logits() -> None:
    """With two keys the probabilities can take four values, one for each choice of dropped logits."""
    drop, count = 0.3, 8000
    query, key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), torch.tensor([0.7, -0.4]).view(1, 1, 2, 1)
    value = torch.eye(2).view(1, 1, 2, 2)
    torch.manual_seed(0)
    expanded = [t.expand(count, 1, -1, -1) for t in (query, key, value)]
    out = causal_attention(*expanded, mask="inclusive", dropout=drop)
    assert torch.equal(out[:, 0, 0], torch.tensor([1.0, 0.0]).expand(count, 2))
    seen = 0
    for kept in itertools.product((0, 1), repeat=2):
        logits = torch.tensor([0.7, -0.4]) * torch.tensor(kept) / (1 - drop)
        hits = int(torch.isclose(out[:, 0, 1, 0], logits.softmax(0)[0], atol=1e-6).sum())
        expected = math.prod(1 - drop if keep else drop for keep in kept)
        assert abs(hits - count * expected) < 5 * (count * expected * (1 - expected)) ** 0.5
        seen += hits
    assert seen == count


@each_mask
def test_attention_dropout_is_reproducible(mask: Mask) -> None:
    query, key, value = (normal(2, 2, 6, 3, seed=seed) for seed in range(3))

    def attend(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return causal_attention(query, key, value, mask=mask, dropout=0.5)

    assert torch.equal(attend(1), attend(1))
    assert not torch.equal(attend(1), attend(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": "none"}, "mask: expected one of"),
        ({"query": torch.zeros(2, 5, 4)}, "query: expected shape"),
        ({"key": torch.zeros(1, 2, 5, 3)}, "key: expected shape"),
        ({"value": torch.zeros(1, 2, 4, 4)}, "value: expected shape"),
    ],
    ids=["mask", "query-3d", "key-width", "value-length"],
)
def test_attention_refuses(arguments: dict[str, object], message: str) -> None:
    call = {name: torch.zeros(1, 2, 5, 4) for name in ("query", "key", "value")}
    with refuses(ArgumentError, message):
        causal_attention(**{**call, **arguments})
