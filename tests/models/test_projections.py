"""Quantisers between linear maps: the same as the maps around a quantiser without; masks, types, states."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import refuses
from quantizer_helpers import normal
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import ResidualVQ, SimVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

F64 = torch.float64

Quantizer = VectorQuantizer | ResidualVQ


def plain(**options: Any) -> VectorQuantizer:
    return VectorQuantizer(9, 4, channels_last=True, **options)


def heads(**options: Any) -> VectorQuantizer:
    return VectorQuantizer(9, 2, heads=2, channels_last=True, **options)


def cosine(**options: Any) -> VectorQuantizer:
    return VectorQuantizer(9, 4, metric="cosine", gradient="rotation", channels_last=True, **options)


def learnable(**options: Any) -> VectorQuantizer:
    return VectorQuantizer(9, 4, learnable_codebook=True, init="data", channels_last=True, **options)


def simvq(**options: Any) -> VectorQuantizer:
    return SimVQ(9, 4, channels_last=True, **options)


def residual(**options: Any) -> ResidualVQ:
    return ResidualVQ(3, 9, 4, channels_last=True, **options)


def shared(**options: Any) -> ResidualVQ:
    return ResidualVQ(3, 9, 4, channels_last=True, shared_codebook=True, init="kmeans", **options)


MAKERS = [plain, heads, cosine, learnable, simvq, residual, shared]
EACH = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def with_inner(make: Any) -> tuple[Quantizer, Quantizer]:
    """A quantiser with maps from and to 6 channels, and one without, of the same codes."""
    outer, inner = make(input_dim=6), make()
    state = {name: value for name, value in outer.state_dict().items() if not name.startswith("project")}
    inner.load_state_dict(state)
    return outer, inner


def maps(quantizer: Quantizer) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    assert quantizer.project_in is not None
    assert quantizer.project_out is not None
    return quantizer.project_in, quantizer.project_out


@EACH
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_it_equals_maps_around_a_quantiser(make: Any, masked: bool) -> None:
    outer, inner = with_inner(make)
    project_in, project_out = maps(outer)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(4)) < 0.6 if masked else None
    for step in range(2):
        x = normal(5, 7, 6, seed=step).requires_grad_()
        torch.manual_seed(step)
        out = outer(x, mask)
        torch.manual_seed(step)
        want = inner(project_in(x), mask)
        wide: Tensor = project_out(want.quantized)
        wide = wide if mask is None else torch.where(mask[..., None], wide, 0)
        torch.testing.assert_close(out.quantized, wide)
        for name in set(out._fields) - {"quantized"}:
            assert torch.equal(getattr(out, name), getattr(want, name)), name
        parameters = [x, *project_in.parameters(), *project_out.parameters()]
        found = torch.autograd.grad(out.quantized.square().sum() + out.loss, parameters)
        wanted = torch.autograd.grad(wide.square().sum() + want.loss, parameters)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    state = inner.state_dict()
    assert all(torch.equal(value, outer.state_dict()[name]) for name, value in state.items())
    outer.eval()
    x = normal(5, 7, 6, seed=9)
    out = outer(x, mask)
    assert torch.equal(outer.encode(x, mask), out.codes)
    torch.testing.assert_close(outer.lookup(out.codes), out.quantized)


@EACH
def test_padding_has_no_influence(make: Any) -> None:
    outer, _ = with_inner(make)
    mask = torch.tensor([[True, False, True, True]] * 3)
    x = normal(3, 4, 6)
    x[~mask] = torch.nan
    x.requires_grad_()
    out = outer(x, mask)
    assert (out.quantized[~mask] == 0).all()
    (out.quantized.square().sum() + out.loss).backward()
    assert x.grad is not None
    assert (x.grad[~mask] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in outer.parameters())
    assert maps(outer)[0].weight.grad is not None


@pytest.mark.parametrize("axes", [(5,), (4, 3), (2, 3, 4)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("kind", ["vector", "simvq", "residual"])
def test_channels_first_and_any_number_of_axes(kind: str, axes: tuple[int, ...], projected: bool) -> None:
    options = {"input_dim": 6} if projected else {}

    def make(channels_last: bool) -> Quantizer:
        torch.manual_seed(1)
        if kind == "residual":
            return ResidualVQ(2, 9, 4, channels_last=channels_last, **options)
        return (VectorQuantizer if kind == "vector" else SimVQ)(9, 4, channels_last=channels_last, **options)

    x = normal(3, 6 if projected else 4, *axes)
    mask = torch.rand(3, *axes, generator=torch.Generator().manual_seed(4)) < 0.8
    out, want = make(False)(x, mask), make(True)(x.movedim(1, -1).flatten(0, -2), mask.flatten())
    assert out.quantized.shape == x.shape
    torch.testing.assert_close(out.quantized.movedim(1, -1).flatten(0, -2), want.quantized)
    assert torch.equal(out.codes.flatten(0, len(axes)), want.codes)
    torch.testing.assert_close(out.loss, want.loss)
    quantizer = make(False).eval()
    codes = quantizer.encode(x)
    assert codes.shape[: 1 + len(axes)] == (3, *axes)
    torch.testing.assert_close(quantizer.lookup(codes), quantizer(x).quantized)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, F64], ids=["bf16", "f64"])
def test_other_types_of_input(make: Any, dtype: torch.dtype) -> None:
    outer, _ = with_inner(make)
    x = normal(8, 6).to(dtype).requires_grad_()
    out = outer.eval()(x)
    assert out.quantized.dtype == dtype
    if dtype == torch.bfloat16:
        # Nothing but the output is rounded to it.
        assert torch.equal(out.quantized, outer(x.detach().float()).quantized.to(dtype))
    out.quantized.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@EACH
def test_under_autocast(make: Any) -> None:
    outer, _ = with_inner(make)
    x = normal(8, 6).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = outer(x)
        (out.quantized.square().mean() + out.loss).backward()
    assert out.quantized.dtype == torch.float32
    assert all(p.grad is not None for layer in maps(outer) for p in layer.parameters())


@pytest.mark.parametrize("make", [plain, residual], ids=["plain", "residual"])
def test_states_are_as_before_without(make: Any) -> None:
    assert not any("project" in name for name in make().state_dict())
    names = {"project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"}
    outer = make(input_dim=6)
    assert outer.state_dict().keys() - make().state_dict().keys() == names
    again = pickle.loads(pickle.dumps(outer.eval()))
    assert torch.equal(again(normal(4, 6)).quantized, outer(normal(4, 6)).quantized)


def test_whole_modules_pickled_before_there_were_projections() -> None:
    quantizer = plain().eval()
    for name in ("project_in", "project_out"):
        del quantizer.__dict__[name]
    again = pickle.loads(pickle.dumps(quantizer))
    assert torch.equal(again(normal(5, 4)).codes, plain_codes(quantizer.embedding, normal(5, 4)))


def plain_codes(embedding: Tensor, x: Tensor) -> Tensor:
    return (x[:, None] - embedding).square().sum(-1).argmin(1)


def test_it_equals_vector_quantize_pytorch() -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    theirs = package.VectorQuantize(6, 9, codebook_dim=4, rotation_trick=False)
    ours = plain(input_dim=6, decay=0.8, commitment=1.0)
    book = theirs._codebook
    state = {"embedding": book.embed[0], "cluster_size": book.cluster_size[0], "embedding_sum": book.embed_avg[0]}
    projections = {name: value for name, value in theirs.state_dict().items() if name.startswith("project")}
    ours.load_state_dict({**state, "initialized": book.initted, **projections})
    for step in range(3):
        x = normal(2, 20, 6, seed=step).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, (quantized, indices, loss) = ours(x), theirs(y)
        assert torch.equal(out.codes, indices)
        torch.testing.assert_close(out.quantized, quantized)
        torch.testing.assert_close(out.loss, loss.squeeze())
        torch.testing.assert_close(
            torch.autograd.grad(out.quantized.square().sum() + out.loss, x),
            torch.autograd.grad(quantized.square().sum() + loss.sum(), y),
        )
    torch.testing.assert_close(ours.embedding, book.embed[0])


def test_the_residual_of_maps_is_that_of_vector_quantize_pytorch() -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    theirs = package.ResidualVQ(dim=6, codebook_dim=4, num_quantizers=3, codebook_size=9, rotation_trick=False)
    ours = residual(input_dim=6, decay=0.8, commitment=1.0)
    for level, layer in enumerate(theirs.layers):
        ours.quantizer(level).embedding.copy_(layer._codebook.embed[0])
    for name in ("project_in", "project_out"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    x = normal(2, 20, 6)
    out, (quantized, indices, losses) = ours.eval()(x), theirs.eval()(x)
    assert torch.equal(out.codes, indices)
    torch.testing.assert_close(out.quantized, quantized)
    assert losses.shape == (3,)
    narrow = F.linear(x, ours.project_in.weight, ours.project_in.bias)  # type: ignore[union-attr]
    first = ours.quantizer(0)(narrow)
    torch.testing.assert_close(out.level_losses[0], first.commitment_loss)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: plain(input_dim=0), ArgumentError, "input_dim: must be at least 1, got 0"),
        (lambda: residual(input_dim=6.0), ArgumentTypeError, "input_dim: expected an int, got float 6.0"),
        (
            lambda: plain(input_dim=6)(torch.zeros(3, 4)),
            ArgumentError,
            r"x: expected 6 channels along axis -1, got shape \[3, 4\]",
        ),
        (
            lambda: residual(input_dim=6)(torch.zeros(3, 4)),
            ArgumentError,
            r"x: expected 6 channels along axis -1, got shape \[3, 4\]",
        ),
    ],
    ids=["zero", "float", "channels", "residual-channels"],
)
def test_refuses(make: Any, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        make()
