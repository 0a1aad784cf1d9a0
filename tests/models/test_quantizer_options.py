"""Options of the quantiser, alone and together, against formulas written out in float64; masks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import refuses
from quantizer_helpers import EACH_LAYOUT, buffers, is_row_of, normal, same
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.models import VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

F64 = torch.float64
NAN = math.nan

EACH_MASK = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def some_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6


def by_hand(quantizer: VectorQuantizer, x: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """One pass over x [N, heads * D], vector by vector, head by head; the state afterwards by the paper's update."""
    heads, dim, num_codes = quantizer.heads, quantizer.code_dim, quantizer.num_codes
    cosine = quantizer.metric == "cosine"
    embedding, size, total = (
        getattr(quantizer, name).clone() for name in ("embedding", "cluster_size", "embedding_sum")
    )
    groups = heads if quantizer.separate_codebook_per_head else 1
    embedding, total = embedding.view(groups, num_codes, dim), total.view(groups, num_codes, dim)
    size = size.view(groups, num_codes)
    counts, sums = torch.zeros_like(size), torch.zeros_like(total)
    codes = torch.full((len(x), heads), -1)
    quantized, squares, values = torch.zeros_like(x), 0.0, 0
    for n, row in enumerate(x):
        for h in range(heads):
            if mask is not None and not mask[n]:
                continue
            vector, g = row[h * dim : (h + 1) * dim], h % groups
            vector = vector / vector.norm() if cosine else vector
            distances = [float((vector - code).square().sum()) for code in embedding[g]]
            code = distances.index(min(distances))
            codes[n, h] = code
            quantized[n, h * dim : (h + 1) * dim] = embedding[g, code]
            squares, values = squares + distances[code], values + dim
            counts[g, code] += 1
            sums[g, code] += vector
    shares = counts / counts.sum(1, keepdim=True)
    perplexities = [math.exp(-sum(float(p) * math.log(p) for p in row if p > 0)) for row in shares]
    size = quantizer.decay * size + (1 - quantizer.decay) * counts
    total = quantizer.decay * total + (1 - quantizer.decay) * sums
    for g in range(groups):
        whole = size[g].sum()
        for k in range(num_codes):
            smoothed = (size[g, k] + quantizer.eps) / (whole + num_codes * quantizer.eps) * whole
            embedding[g, k] = total[g, k] / (total[g, k].norm() if cosine else smoothed)
    return {
        "codes": codes if heads > 1 else codes[:, 0],
        "quantized": quantized,
        "commitment_loss": torch.tensor(quantizer.commitment * squares / values, dtype=F64),
        "perplexity": torch.tensor(sum(perplexities) / groups, dtype=F64),
        "dead_codes": (counts == 0).sum(),
        "state": {
            "embedding": embedding.view_as(quantizer.embedding),
            "cluster_size": size.view_as(quantizer.cluster_size),
            "embedding_sum": total.view_as(quantizer.embedding),
        },
    }


@EACH_LAYOUT
@EACH_MASK
def test_passes_equal_the_formulas(options: dict[str, Any], masked: bool) -> None:
    quantizer = VectorQuantizer(7, 4, decay=0.7, commitment=0.3, channels_last=True, **options).double()
    for step in range(3):
        x = normal(11, 4 * quantizer.heads, seed=step, dtype=F64)
        mask = some_mask(11) if masked else None
        want = by_hand(quantizer, x, mask)
        calm = copy.deepcopy(quantizer).eval()
        for quantizer_in_mode in (calm, quantizer):
            out = quantizer_in_mode(x, mask)
            for name in ("codes", "quantized", "commitment_loss", "perplexity", "dead_codes"):
                torch.testing.assert_close(
                    getattr(out, name), want[name], rtol=1e-10, atol=1e-12, msg=f"{name}, {step}"
                )
            assert out.codebook_loss == 0
            assert out.loss == out.commitment_loss
            assert torch.equal(calm.encode(x, mask), out.codes)
            assert torch.equal(calm.lookup(out.codes), out.quantized)
        for name, value in want["state"].items():
            torch.testing.assert_close(getattr(quantizer, name), value, rtol=1e-10, atol=1e-12)
        if quantizer.metric == "cosine":
            torch.testing.assert_close(quantizer.embedding.norm(dim=-1), torch.ones_like(quantizer.cluster_size))


@EACH_LAYOUT
@pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 5)], ids=lambda s: f"{len(s) + 1}d")
def test_channels_first_and_last_agree(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first = VectorQuantizer(6, 4, **options)
    last = VectorQuantizer(6, 4, channels_last=True, **options)
    last.load_state_dict(first.state_dict())
    x, mask = normal(*shape, 4 * first.heads), some_mask(*shape)
    out, other = first(x.movedim(-1, 1), mask), last(x, mask)
    assert out.codes.shape == (shape if first.heads == 1 else (*shape, 3))
    assert torch.equal(out.codes, other.codes)
    assert torch.equal(out.quantized.movedim(1, -1), other.quantized)
    assert torch.equal(first.lookup(out.codes).movedim(1, -1), last.lookup(out.codes))
    torch.testing.assert_close(buffers(first), buffers(last))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_heads_with_codebooks_equal_separate_quantisers(metric: str) -> None:
    together = VectorQuantizer(6, 4, heads=3, separate_codebook_per_head=True, metric=metric, channels_last=True)  # type: ignore[arg-type]
    apart = [VectorQuantizer(6, 4, metric=metric, channels_last=True) for _ in range(3)]  # type: ignore[arg-type]
    for head, quantizer in enumerate(apart):
        for name in ("embedding", "cluster_size", "embedding_sum"):
            getattr(quantizer, name).copy_(getattr(together, name)[head])
    for seed in range(3):
        x = normal(20, 12, seed=seed)
        out = together(x)
        parts = [quantizer(part) for quantizer, part in zip(apart, x.chunk(3, 1), strict=True)]
        assert torch.equal(out.codes, torch.stack([part.codes for part in parts], 1))
        assert torch.equal(out.quantized, torch.cat([part.quantized for part in parts], 1))
        torch.testing.assert_close(out.commitment_loss, torch.stack([part.commitment_loss for part in parts]).mean())
        torch.testing.assert_close(out.perplexity, torch.stack([part.perplexity for part in parts]).mean())
    for name in ("embedding", "cluster_size", "embedding_sum"):
        assert torch.equal(getattr(together, name), torch.stack([getattr(quantizer, name) for quantizer in apart]))


def test_heads_of_one_codebook_equal_more_vectors() -> None:
    heads, plain = VectorQuantizer(6, 4, heads=3, channels_last=True), VectorQuantizer(6, 4, channels_last=True)
    plain.load_state_dict(heads.state_dict())
    x = normal(20, 12)
    out, other = heads(x), plain(x.view(20, 3, 4))
    assert torch.equal(out.codes, other.codes)
    assert torch.equal(out.quantized, other.quantized.view(20, 12))
    assert same(buffers(heads), buffers(plain))


@EACH_LAYOUT
@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("revive_below", [0.0, 0.5])
def test_masked_vectors_change_nothing(options: dict[str, Any], init: Any, revive_below: float) -> None:
    """Whatever lies under the mask, NaN included: the same codes, losses, gradients, codebook and random numbers."""
    results = []
    mask = some_mask(3, 9)
    for filler in (7.0, NAN):
        torch.manual_seed(3)
        quantizer = VectorQuantizer(6, 4, init=init, revive_below=revive_below, channels_last=True, **options)
        for seed in range(3):
            x = torch.where(mask[..., None], normal(3, 9, 4 * quantizer.heads, seed=seed), filler).requires_grad_()
            out = quantizer(x, mask)
            (grad,) = torch.autograd.grad(out.quantized.square().sum() + out.loss, x)
            results.append((*out, grad, buffers(quantizer)))
        assert (out.codes[~mask] == -1).all()
        assert (out.codes[mask] >= 0).all()
        assert (out.quantized[~mask] == 0).all()
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).any()
    for left, right in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_masked_vectors_are_no_new_place_for_dead_codes() -> None:
    quantizer = VectorQuantizer(50, 2, decay=0.5, revive_below=1.3, channels_last=True)
    x = normal(30, 2)
    mask = some_mask(30)
    quantizer(x, mask)
    revived = quantizer.cluster_size == torch.tensor(1.3)
    assert revived.any()
    assert is_row_of(quantizer.embedding[revived], x[mask])
    # Each real vector is a place for some code.
    assert len(quantizer.embedding[revived].unique(dim=0)) > mask.sum() // 2


@pytest.mark.parametrize("revive_below", [0.0, 0.5])
def test_a_mask_of_padding_alone_leaves_the_codebook_as_it_is(revive_below: float) -> None:
    quantizer = VectorQuantizer(6, 4, revive_below=revive_below, channels_last=True)
    before = buffers(quantizer)
    out = quantizer(normal(5, 4), torch.zeros(5, dtype=torch.bool))
    assert same(buffers(quantizer), before)
    assert (out.commitment_loss, out.perplexity, out.dead_codes) == (0, 1, 6)
    starting = VectorQuantizer(6, 4, init="data", channels_last=True)
    with refuses(ArgumentError, "x: the first batch holds no finite vector"):
        starting(normal(5, 4), torch.zeros(5, dtype=torch.bool))


@pytest.mark.parametrize("revive_below", [0.2, 1.0, 2.5])
def test_revived_codes_begin_at_the_threshold_or_one(revive_below: float) -> None:
    quantizer = VectorQuantizer(3, 2, decay=0.9, revive_below=revive_below, channels_last=True)
    quantizer.embedding[2] = quantizer.embedding_sum[2] = 100
    quantizer.cluster_size[2] = 0.1
    x = normal(40, 2)
    quantizer(x)
    begin = torch.tensor(max(1.0, revive_below))
    assert quantizer.cluster_size[2] == begin
    assert is_row_of(quantizer.embedding[2:], x)
    torch.testing.assert_close(quantizer.embedding_sum[2], quantizer.embedding[2] * begin)


@pytest.mark.parametrize("way", ["attribute", "argument"])
def test_frozen_codebook(way: str) -> None:
    quantizer = VectorQuantizer(6, 4, init="data", revive_below=0.9, freeze_codebook=way == "attribute")
    calm = copy.deepcopy(quantizer).eval()
    before, x = buffers(quantizer), normal(2, 4, 9)
    out = quantizer(x, freeze_codebook=None if way == "attribute" else True)
    torch.testing.assert_close(out, calm(x), rtol=0, atol=0)
    assert same(buffers(quantizer), before)
    # The argument goes before the attribute.
    quantizer(x, freeze_codebook=False)
    assert bool(quantizer.initialized)
    assert not same(buffers(quantizer), before)


@EACH_LAYOUT
@EACH_MASK
def test_learnable_codebook_gradcheck(options: dict[str, Any], masked: bool) -> None:
    quantizer = VectorQuantizer(5, 3, learnable_codebook=True, commitment=0.3, channels_last=True, **options).double()
    assert [name for name, _ in quantizer.named_parameters()] == ["embedding"]
    assert "embedding_sum" not in quantizer.state_dict()
    x, mask = normal(8, 3 * quantizer.heads, dtype=F64), some_mask(8) if masked else None
    start = quantizer.embedding.detach().clone()

    def codebook_loss(embedding: Tensor) -> Tensor:
        return torch.func.functional_call(quantizer.eval(), {"embedding": embedding}, (x, mask)).codebook_loss

    assert torch.autograd.gradcheck(codebook_loss, (start.requires_grad_(),))
    leaf = x.clone().requires_grad_()
    out = quantizer(leaf, mask)
    torch.testing.assert_close(out.codebook_loss * 0.3, out.commitment_loss)
    assert out.loss == out.commitment_loss + out.codebook_loss
    # The third term reaches the codes alone, the others the input alone.
    assert torch.autograd.grad(out.codebook_loss, leaf, retain_graph=True, allow_unused=True)[0] is None
    for value in (out.commitment_loss, out.quantized.sum()):
        assert torch.autograd.grad(value, quantizer.embedding, retain_graph=True, allow_unused=True)[0] is None


def test_learnable_codebook_is_trained_by_an_optimiser() -> None:
    quantizer = VectorQuantizer(8, 2, learnable_codebook=True, channels_last=True)
    centres = torch.cartesian_prod(torch.arange(4.0), torch.arange(2.0)) * 4
    with torch.no_grad():
        quantizer.embedding.copy_(centres + normal(8, 2).clamp(-1, 1))
    # With ten of 80 vectors each, a code goes half of the way to their mean in a step.
    optimiser = torch.optim.SGD(quantizer.parameters(), lr=4.0)
    for seed in range(20):
        out = quantizer(centres.repeat(10, 1) + 0.1 * normal(80, 2, seed=seed))
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    assert (quantizer.embedding - centres).abs().max() < 0.1
    # The use of codes is still followed.
    torch.testing.assert_close(quantizer.cluster_size, torch.full((8,), 0.99**20 + 10 * (1 - 0.99**20)))


def test_dead_codes_of_a_learnable_codebook_are_revived() -> None:
    quantizer = VectorQuantizer(6, 2, learnable_codebook=True, decay=0.5, revive_below=0.6, channels_last=True)
    with torch.no_grad():
        quantizer.embedding[5] = 100
    x = normal(60, 2)
    out = quantizer(x)
    assert is_row_of(quantizer.embedding[5:].detach(), x)
    # Revival comes between the forward and the backward pass, and does not disturb it.
    out.loss.backward()
    assert quantizer.embedding.grad is not None
    assert (quantizer.embedding.grad[5] == 0).all()


@pytest.mark.parametrize(("num_codes", "dim"), [(5, 3), (3, 5)])
def test_orthogonal_loss(num_codes: int, dim: int) -> None:
    quantizer = VectorQuantizer(num_codes, dim, heads=2, separate_codebook_per_head=True, learnable_codebook=True)
    quantizer = quantizer.double()
    want = 0.0
    for codes in quantizer.embedding.detach():
        cosines = [[float(torch.cosine_similarity(a, b, 0)) ** 2 for b in codes] for a in codes]
        want += (sum(map(sum, cosines)) / num_codes**2 - 1 / num_codes) / 2
    found = quantizer.orthogonal_loss()
    assert found.item() == pytest.approx(want, rel=1e-10)
    (grad,) = torch.autograd.grad(found, quantizer.embedding)
    assert (grad != 0).any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_check_finite(training: bool) -> None:
    quantizer = VectorQuantizer(6, 4, check_finite=True, channels_last=True).train(training)
    x, mask = normal(5, 4), torch.tensor([True, True, False, True, True])
    x[2, 1] = NAN
    before = buffers(quantizer)
    for call in (quantizer, quantizer.encode):
        with refuses(ArgumentError, "x: expected finite values"):
            call(x)
        assert same(buffers(quantizer), before)
    assert torch.equal(quantizer.encode(x, mask), quantizer(x, mask).codes)


@pytest.mark.parametrize("iterations", [1, 4])
def test_kmeans_iterations(iterations: int) -> None:
    x = normal(60, 3)
    start, ended = (
        VectorQuantizer(5, 3, init=init, kmeans_iters=iterations, channels_last=True) for init in ("data", "kmeans")
    )
    for quantizer in (start, ended):
        torch.manual_seed(4)
        quantizer.initialize(x)
    centres = start.embedding.double()
    for _ in range(iterations):
        nearest = (x.double()[:, None] - centres).square().sum(-1).argmin(1)
        centres = torch.stack([x.double()[nearest == k].mean(0) for k in range(5)])
    torch.testing.assert_close(ended.embedding.double(), centres, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_cosine_codes_start_on_the_sphere(init: Any) -> None:
    quantizer = VectorQuantizer(5, 3, init=init, metric="cosine", channels_last=True)
    x = normal(40, 3)
    x[::3] = 0  # no direction to start from
    quantizer.initialize(x)
    torch.testing.assert_close(quantizer.embedding.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(VectorQuantizer(5, 3, metric="cosine").embedding.norm(dim=1), torch.ones(5))


def test_cosine_code_whose_average_vanishes_stays() -> None:
    quantizer = VectorQuantizer(2, 2, metric="cosine", decay=0.0, channels_last=True)
    quantizer.embedding.copy_(torch.tensor([[1.0, 0.0], [-0.6, -0.8]]))
    quantizer(torch.tensor([[0.0, 1.0], [0.0, 0.0], [-3.0, -4.0]]))
    # Its vectors: (0, 1) and one without direction; the other code's: (-0.6, -0.8).
    torch.testing.assert_close(quantizer.embedding, torch.tensor([[0.0, 1.0], [-0.6, -0.8]]))
    before = quantizer.embedding.clone()
    quantizer(torch.zeros(4, 2))
    assert torch.equal(quantizer.embedding, before)


@EACH_LAYOUT
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_input_of_a_float32_codebook(options: dict[str, Any], autocast: bool) -> None:
    wide, narrow = (VectorQuantizer(6, 4, gradient="rotation", **options) for _ in range(2))
    narrow.load_state_dict(wide.state_dict())
    x = normal(2, 4 * wide.heads, 9).bfloat16()
    want = wide(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        leaf = x.clone().requires_grad_()
        out = narrow(leaf)
        orthogonal = narrow.orthogonal_loss()
    assert (out.quantized.dtype, out.commitment_loss.dtype, orthogonal.dtype) == (x.dtype, torch.float32, torch.float32)
    assert torch.equal(out.codes, want.codes)
    assert torch.equal(out.quantized, want.quantized.bfloat16())
    assert torch.equal(out.commitment_loss, want.commitment_loss)
    assert torch.equal(orthogonal, wide.orthogonal_loss())
    assert same(buffers(narrow), buffers(wide))
    (out.quantized.float().square().sum() + out.loss).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.isfinite().all()
