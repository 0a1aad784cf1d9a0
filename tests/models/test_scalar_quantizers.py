"""FSQ and LFQ against formulas written out and against another package; layouts, masks, refusals."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import refuses
from quantizer_helpers import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastvq
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import FSQ, LFQ, QuantizerOutput

pytestmark = pytest.mark.usefixtures("steady")

F64 = torch.float64
NAN = math.nan


def fsq(**options: Any) -> FSQ:
    return FSQ((4, 3, 7), **options)


def lfq(**options: Any) -> LFQ:
    return LFQ(3, **{"temperature": 0.7, **options})


EACH = pytest.mark.parametrize("make", [fsq, lfq], ids=["fsq", "lfq"])
EACH_HEADS = pytest.mark.parametrize("heads", [1, 2], ids=["one", "heads"])


def test_they_are_exported() -> None:
    assert fastvq.FSQ is FSQ
    assert fastvq.LFQ is LFQ


@pytest.mark.parametrize("levels", [(3,), (4,), (8, 5, 5, 5), (7, 6, 1000)], ids=str)
def test_fsq_by_hand(levels: tuple[int, ...]) -> None:
    quantizer = FSQ(levels, channels_last=True)
    x = 3 * normal(40, len(levels), dtype=F64)
    out = quantizer(x)
    for row, code, vector in zip(x.tolist(), out.codes.tolist(), out.quantized.tolist(), strict=True):
        wanted, place = 0, 1
        for z, count, value in zip(row, levels, vector, strict=True):
            half = (count - 1) / 2 * 1.001
            offset = 0.5 if count % 2 == 0 else 0.0
            nearest = round(half * math.tanh(z + math.atanh(offset / half)) - offset)
            assert value == pytest.approx(nearest / (count // 2), abs=1e-12)
            wanted += place * (nearest + count // 2)
            place *= count
        assert code == wanted
    assert out.commitment_loss == out.codebook_loss == out.loss == 0


@pytest.mark.parametrize("levels", [(3,), (4, 5), (6, 7, 3)], ids=str)
def test_fsq_reaches_every_code_and_no_other(levels: tuple[int, ...]) -> None:
    quantizer = FSQ(levels, channels_last=True)
    line = torch.cat([torch.linspace(-5, 5, 301), torch.tensor([-math.inf, math.inf, -1e30, 1e30])])
    for channel, count in enumerate(levels):
        x = torch.zeros(len(line), len(levels))
        x[:, channel] = line
        values = quantizer(x).quantized[:, channel].unique()
        torch.testing.assert_close(values, (torch.arange(count) - count // 2) / (count // 2), rtol=0, atol=0)
    codes = torch.arange(quantizer.num_codes)
    vectors = quantizer.lookup(codes)
    assert vectors.abs().max() <= 1
    assert len(vectors.unique(dim=0)) == quantizer.num_codes == math.prod(levels)


def test_fsq_maps_zero_to_zero() -> None:
    assert (FSQ((3, 4, 5, 6))(torch.zeros(1, 4)).quantized == 0).all()


def test_the_gradient_of_fsq_is_that_of_its_bound() -> None:
    x = normal(20, 3, dtype=F64).requires_grad_()
    weights = normal(20, 3, seed=1, dtype=F64)
    (fsq(channels_last=True)(x).quantized * weights).sum().backward()
    levels = torch.tensor([4.0, 3.0, 7.0], dtype=F64)
    half = (levels - 1) / 2 * 1.001
    shift = torch.atanh(torch.tensor([0.5, 0.0, 0.0], dtype=F64) / half)
    slope = half / (levels // 2) / torch.cosh(x.detach() + shift) ** 2
    torch.testing.assert_close(x.grad, weights * slope)


def test_nan_stays_nan_in_fsq_and_has_the_first_level() -> None:
    x = torch.tensor([[NAN, 9.0, 9.0]])
    out = fsq()(x)
    assert out.quantized.isnan().tolist() == [[True, False, False]]
    assert out.codes.tolist() == [0 + 4 * 2 + 12 * 6]


def entropies_by_table(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of vectors [N, D], with the distances of all to all codes."""
    codes = torch.tensor([*itertools.product([-1.0, 1.0], repeat=x.shape[1])], dtype=x.dtype)
    chances = torch.softmax(-(x[:, None] - codes).square().sum(-1) / temperature, 1)
    each = -torch.xlogy(chances, chances).sum(1).mean()
    mean = chances.mean(0)
    return each, -torch.xlogy(mean, mean).sum()


@EACH_HEADS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_lfq_by_hand(bits: int, masked: bool, heads: int) -> None:
    quantizer = LFQ(
        bits, heads=heads, channels_last=True, commitment=0.3, entropy_weight=0.2, diversity=0.8, temperature=0.7
    )
    x = normal(30, heads * bits, dtype=F64).requires_grad_()
    mask = torch.rand(30, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else torch.ones(30).bool()
    out = quantizer(x, mask if masked else None)
    real = x[mask].view(-1, heads, bits)
    signs = torch.where(real > 0, 1.0, -1.0).to(F64)
    assert torch.equal(out.quantized[mask], signs.flatten(1))
    wanted = [[int("".join("01"[bit > 0] for bit in head), 2) for head in row] for row in signs.tolist()]
    assert out.codes[mask].view(-1, heads).tolist() == wanted
    torch.testing.assert_close(out.commitment_loss, 0.3 * (real - signs).square().mean())
    found = [entropies_by_table(real[:, head], 0.7) for head in range(heads)]
    entropy = sum(0.2 * (each - 0.8 * mean) for each, mean in found) / heads
    torch.testing.assert_close(out.codebook_loss, entropy)
    assert torch.equal(out.loss, out.commitment_loss + out.codebook_loss)
    # The same by way of the table, whose gradient PyTorch finds.
    (found_grad,) = torch.autograd.grad(out.codebook_loss, x)
    (wanted_grad,) = torch.autograd.grad(entropy, x)
    torch.testing.assert_close(found_grad, wanted_grad)


def test_codes_that_are_as_good_as_impossible_leave_gradients_finite() -> None:
    x = (5 * normal(6, 8)).requires_grad_()
    out = LFQ(8, temperature=0.01)(x)
    out.loss.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    # Every vector decides, for another code than the others: ln 6 of entropy in the mean and none in each.
    assert out.perplexity == pytest.approx(6)
    assert out.codebook_loss.item() == pytest.approx(-0.1 * math.log(6), rel=1e-5)


def test_lfq_without_an_entropy_loss() -> None:
    out = LFQ(3, entropy_weight=0.0)(normal(5, 3))
    assert out.codebook_loss == 0
    assert out.commitment_loss > 0


def test_lfq_makes_no_table_of_vectors_and_codes() -> None:
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(value.numel() for value in tree_leaves(out) if isinstance(value, Tensor))
            return out

    x = normal(256, 12).requires_grad_()
    with Watch():
        LFQ(12)(x).loss.backward()
    assert max(sizes) == 256 * 64  # and not 256 * 4096


@EACH
@EACH_HEADS
@pytest.mark.parametrize("axes", [(), (5,), (4, 3), (2, 3, 4)], ids=["vectors", "1d", "2d", "3d"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_layouts(make: Any, heads: int, axes: tuple[int, ...], projected: bool) -> None:
    options = {"heads": heads, "input_dim": 5 if projected else None}
    first, last = make(**options), make(**options, channels_last=True)
    last.load_state_dict(first.state_dict())
    channels = 5 if projected else 3 * heads
    x = normal(6, channels, *axes)
    out, moved = first(x), last(x.movedim(1, -1))
    assert out.quantized.shape == x.shape
    assert out.codes.shape == (6, *axes, heads)[: 1 + len(axes) + (heads > 1)]
    assert torch.equal(out.quantized.movedim(1, -1), moved.quantized)
    for name in ("codes", "perplexity", "dead_codes", "loss"):
        assert torch.equal(getattr(out, name), getattr(moved, name)), name
    assert torch.equal(first.encode(x), out.codes)
    assert torch.equal(last.encode(x.movedim(1, -1)), out.codes)
    torch.testing.assert_close(first.lookup(out.codes), out.quantized)
    torch.testing.assert_close(last.lookup(out.codes), moved.quantized)


@EACH
@EACH_HEADS
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_masked_vectors_count_nowhere(make: Any, heads: int, projected: bool) -> None:
    channels = 4 if projected else 3 * heads
    quantizer = make(heads=heads, channels_last=True, input_dim=4 if projected else None)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    x = normal(2, 3, channels)
    x[~mask] = NAN
    x.requires_grad_()
    out = quantizer(x, mask)
    alone = quantizer(x.detach()[mask])
    torch.testing.assert_close(out.quantized[mask], alone.quantized)
    assert torch.equal(out.codes[mask], alone.codes)
    assert (out.codes[~mask] == -1).all()
    assert (out.quantized[~mask] == 0).all()
    for name in ("perplexity", "dead_codes", "commitment_loss", "codebook_loss"):
        torch.testing.assert_close(getattr(out, name), getattr(alone, name))
    assert torch.equal(quantizer.encode(x, mask), out.codes)
    assert torch.equal(quantizer.lookup(out.codes)[~mask], torch.zeros(2, channels))
    (out.quantized.square().sum() + out.loss).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in quantizer.parameters())


@EACH
def test_use_of_codes(make: Any) -> None:
    quantizer = make(channels_last=True)
    # Three vectors of one code and one of another.
    x = torch.tensor([[-9.0, -9.0, -9.0]] * 3 + [[9.0, 9.0, 9.0]])
    out = quantizer(x)
    assert out.codes.tolist() == [0, 0, 0, quantizer.num_codes - 1]
    assert out.dead_codes == quantizer.num_codes - 2
    assert float(out.perplexity) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64], ids=["bf16", "fp16", "f64"])
def test_other_types(make: Any, dtype: torch.dtype) -> None:
    quantizer = make(channels_last=True)
    x = normal(50, 3).to(dtype).requires_grad_()
    out = quantizer(x)
    assert out.quantized.dtype == dtype
    exact = quantizer(x.detach().to(F64))
    if dtype != F64:
        assert torch.equal(out.codes, quantizer(x.detach().float()).codes)
    torch.testing.assert_close(out.quantized, exact.quantized.to(dtype))
    out.quantized.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    # Conversions of the module change nothing.
    assert torch.equal(copy.deepcopy(quantizer).to(dtype)(x).codes, out.codes)


@EACH
def test_under_autocast(make: Any) -> None:
    quantizer = make(channels_last=True)
    x = normal(50, 3)
    plain = quantizer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(x)
        assert torch.equal(quantizer.encode(x), plain.codes)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    mapped = make(channels_last=True, input_dim=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mapped(normal(50, 8)).quantized.dtype == torch.float32
    assert mapped(normal(50, 8).bfloat16()).quantized.dtype == torch.bfloat16


@EACH
def test_no_vectors(make: Any) -> None:
    x = torch.zeros(0, 3).requires_grad_()
    out = make()(x)
    out.loss.backward() if out.loss.requires_grad else None
    assert out.codes.shape == (0,)
    assert out.dead_codes == make().num_codes
    assert out.perplexity == 1
    assert out.loss == 0


@EACH
def test_compiled_without_a_break(make: Any) -> None:
    torch.compiler.reset()
    quantizer = make(input_dim=5)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x = normal(6, 5, 4)
    for one, other in zip(quantizer(x), compiled(x), strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


@EACH
def test_under_vmap(make: Any) -> None:
    quantizer = make(channels_last=True)
    x = normal(3, 7, 3)
    together = torch.func.vmap(lambda batch: tuple(quantizer(batch)))(x)
    for index, batch in enumerate(x):
        for one, other in zip(quantizer(batch), together, strict=True):
            torch.testing.assert_close(one, other[index])


@EACH
def test_states_hold_projections_alone(make: Any) -> None:
    assert make().state_dict() == {}
    names = {"project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"}
    quantizer = make(input_dim=5)
    assert quantizer.state_dict().keys() == names
    x = normal(4, 5)
    again = pickle.loads(pickle.dumps(quantizer))
    assert all(torch.equal(a, b) for a, b in zip(again(x), quantizer(x), strict=True))


@EACH
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@EACH_HEADS
def test_it_equals_vector_quantize_pytorch(make: Any, heads: int, projected: bool) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    dim = 8 if projected else 3 * heads
    ours = make(channels_last=True, heads=heads, input_dim=dim if projected else None)
    inverse = {}
    if make is fsq:
        theirs = package.FSQ([4, 3, 7], dim=dim, num_codebooks=heads)
    else:
        theirs = package.LFQ(dim=dim, codebook_size=8, num_codebooks=heads, commitment_loss_weight=0.25)
        inverse = {"inv_temperature": 1 / 0.7}
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name.startswith("project")})
    x = (2 * normal(3, 20, dim)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out: QuantizerOutput = ours(x)
    quantized, indices, *losses = theirs(y, **inverse)
    assert torch.equal(out.codes, indices.long())
    torch.testing.assert_close(out.quantized, quantized)
    for loss in losses:
        torch.testing.assert_close(out.loss, loss)
    (out.quantized.square().sum() + out.loss).backward()
    (quantized.square().sum() + sum(losses)).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.lookup(out.codes), theirs.indices_to_codes(indices))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FSQ(8), ArgumentTypeError, "levels: expected a list of ints, one for each channel, got 8"),
        (lambda: FSQ([]), ArgumentTypeError, r"levels: expected a list of ints, one for each channel, got \[\]"),
        (lambda: FSQ([8, 2]), ArgumentError, r"levels\[1\]: must be at least 3, got 2"),
        (lambda: FSQ([1001]), ArgumentError, r"levels\[0\]: must be at most 1000, got 1001"),
        (lambda: FSQ([8, 5.0]), ArgumentTypeError, r"levels\[1\]: expected an int, got float 5.0"),
        (lambda: FSQ([300] * 3), ArgumentError, "FSQ: expected at most 16777216 codes, got 27000000"),
        (lambda: FSQ([8], heads=0), ArgumentError, "heads: must be at least 1, got 0"),
        (lambda: FSQ([8], input_dim=0), ArgumentError, "input_dim: must be at least 1, got 0"),
        (lambda: FSQ([8], channels_last=1), ArgumentTypeError, "channels_last: expected a bool, got int 1"),
        (lambda: LFQ(25), ArgumentError, "code_dim: must be at most 24, got 25"),
        (lambda: LFQ(3, temperature=0), ArgumentError, "temperature: must be above 0 and finite, got 0"),
        (lambda: LFQ(3, entropy_weight=-1), ArgumentError, "entropy_weight: must not be negative, and finite, got -1"),
        (lambda: fsq()(torch.zeros(2, 4)), ArgumentError, r"x: expected 3 channels along axis 1, got shape \[2, 4\]"),
        (
            lambda: fsq(input_dim=7)(torch.zeros(2, 3)),
            ArgumentError,
            r"x: expected 7 channels along axis 1, got shape \[2, 3\]",
        ),
        (lambda: lfq().lookup(torch.tensor([8])), ArgumentError, r"codes: values must lie in 0..7, got 8"),
        (
            lambda: lfq(heads=2).lookup(torch.zeros(4, 3).long()),
            ArgumentError,
            r"codes: expected a last axis of 2 heads, got shape \[4, 3\]",
        ),
        (
            lambda: lfq().encode(torch.zeros(2, 3, 4), torch.ones(2, 3).bool()),
            ArgumentError,
            r"mask: expected shape \[2, 4\], got \[2, 3\]",
        ),
    ],
    ids=[
        "int",
        "empty",
        "two",
        "1001",
        "float",
        "codes",
        "heads",
        "input_dim",
        "flag",
        "bits",
        "temperature",
        "weight",
        "channels",
        "projected",
        "range",
        "lookup-heads",
        "mask",
    ],
)
def test_refuses(make: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        make()
