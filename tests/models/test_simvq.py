"""A frozen codebook under a learnable map, against formulas written out and another package."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import refuses
from quantizer_helpers import normal

import fastvq
from fastvq.errors import ArgumentError
from fastvq.models import SimVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

F64 = torch.float64


def test_it_is_exported() -> None:
    assert fastvq.SimVQ is SimVQ


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("heads", [1, 2], ids=["one", "heads"])
def test_by_hand(metric: Any, masked: bool, heads: int) -> None:
    quantizer = SimVQ(7, 4, metric=metric, heads=heads, channels_last=True).to(F64)
    x = normal(3, 5, heads * 4, dtype=F64).requires_grad_()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else torch.ones(3, 5).bool()
    out = quantizer(x, mask if masked else None)
    weight = quantizer.transform.weight
    vectors, codes = x[mask].view(-1, 4), quantizer.embedding @ weight.T
    if metric == "cosine":
        vectors, codes = (value / value.norm(dim=-1, keepdim=True) for value in (vectors, codes))
    nearest = (vectors[:, None] - codes).square().sum(-1).argmin(1)
    assert torch.equal(out.codes[mask].flatten(), nearest)
    chosen = codes[nearest]
    torch.testing.assert_close(out.quantized[mask].view(-1, 4), chosen.detach(), check_dtype=False)
    pull, push = (vectors - chosen.detach()).square().mean(), (vectors.detach() - chosen).square().mean()
    torch.testing.assert_close(out.commitment_loss, 0.25 * pull)
    torch.testing.assert_close(out.codebook_loss, push)
    wanted = torch.autograd.grad(0.25 * pull + push, [x, weight], retain_graph=True)
    for one, other in zip(torch.autograd.grad(out.loss, [x, weight]), wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(quantizer.encode(x, mask if masked else None), out.codes)
    torch.testing.assert_close(quantizer.lookup(out.codes), out.quantized)


def test_an_optimiser_moves_the_map_and_all_codes_with_it() -> None:
    quantizer = SimVQ(64, 4, channels_last=True)
    assert [name for name, _ in quantizer.named_parameters()] == ["transform.weight"]
    frozen, before = quantizer.embedding.clone(), quantizer.codebook.table.detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    x = normal(20, 4) + 2
    first = quantizer(x)
    assert first.dead_codes > 0
    first.loss.backward()
    optimizer.step()
    assert torch.equal(quantizer.embedding, frozen)
    moved = (quantizer.codebook.table - before).norm(dim=-1)
    assert (moved > 0).all()
    assert quantizer(x).codebook_loss < first.codebook_loss


def test_the_state_holds_codes_and_map() -> None:
    quantizer = SimVQ(6, 4)
    assert quantizer.state_dict().keys() == {"embedding", "cluster_size", "initialized", "transform.weight"}
    other = SimVQ(6, 4)
    x = normal(8, 4, 3)
    other.load_state_dict(quantizer.state_dict())
    copies = [other, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))]
    assert all(torch.equal(one.eval()(x).quantized, quantizer.eval()(x).quantized) for one in copies)


def test_codes_are_the_same_under_autocast() -> None:
    quantizer, x = SimVQ(40, 6), normal(30, 6, 5)
    plain = quantizer.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(x), plain)
        assert torch.equal(quantizer(x).codes, plain)
        assert quantizer.lookup(plain).dtype == torch.float32


def test_codes_with_orthogonal_directions_under_the_map() -> None:
    quantizer = SimVQ(3, 3)
    quantizer.embedding.copy_(torch.eye(3))
    with torch.no_grad():
        quantizer.transform.weight.copy_(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(quantizer.orthogonal_loss(), torch.tensor(0.0))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_it_equals_vector_quantize_pytorch(gradient: Any) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    theirs = package.SimVQ(8, 32, rotation_trick=gradient == "rotation")
    ours = SimVQ(32, 8, gradient=gradient, channels_last=True)
    ours.embedding.copy_(theirs.frozen_codebook)
    ours.transform.load_state_dict(theirs.code_transform.state_dict())
    x = normal(2, 50, 8).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out = ours(x)
    quantized, indices, loss = theirs(y)
    assert torch.equal(out.codes, indices)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(out.loss, loss)
    mine = torch.autograd.grad(out.loss, [x, ours.transform.weight], retain_graph=True)
    other = torch.autograd.grad(loss, [y, theirs.code_transform.weight], retain_graph=True)
    torch.testing.assert_close(mine, other)
    torch.testing.assert_close(
        torch.autograd.grad(out.quantized.square().sum(), x), torch.autograd.grad(quantized.square().sum(), y)
    )


@pytest.mark.parametrize(
    "options",
    [{"decay": 0.9}, {"init": "kmeans"}, {"revive_below": 1.0}, {"learnable_codebook": True}],
    ids=lambda options: next(iter(options)),
)
def test_refuses_rules_by_which_codebooks_follow_data(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with refuses(ArgumentError, f"{name}: a codebook that is frozen under a map has none, got"):
        SimVQ(4, 3, **options)


def test_a_plain_quantiser_with_the_mapped_codes_finds_the_same() -> None:
    quantizer, plain = SimVQ(9, 5).eval(), VectorQuantizer(9, 5).eval()
    plain.embedding.copy_(quantizer.codebook.table[0])
    x = normal(20, 5, 4)
    assert torch.equal(quantizer(x).codes, plain(x).codes)
    assert torch.equal(quantizer(x).quantized, plain(x).quantized)
