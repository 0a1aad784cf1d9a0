"""Residual quantisation against a loop written by hand; shared codebooks, dropped levels, masks, gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import refuses
from quantizer_helpers import buffers, is_row_of, normal, same
from torch import Tensor

import fastvq
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import ResidualVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

F64 = torch.float64
STATE = ("embedding", "cluster_size", "embedding_sum")


def states(quantizer: ResidualVQ) -> list[dict[str, Tensor]]:
    return [buffers(level) for level in quantizer.levels]  # type: ignore[arg-type]


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    return (vectors[:, None] - codebook).square().sum(-1).argmin(1)


def test_it_is_exported() -> None:
    assert fastvq.ResidualVQ is ResidualVQ


@pytest.mark.parametrize(
    ("given", "options", "found"),
    [(7, {}, 7), ((7, 5, 6), {}, (7, 5, 6)), ([5, 5, 5], {}, 5), (7, {"shared_codebook": True}, 7)],
    ids=["alike", "each", "alike-each", "shared"],
)
def test_num_codes(given: Any, options: dict[str, Any], found: Any) -> None:
    assert ResidualVQ(3, given, 4, **options).num_codes == found


@pytest.mark.parametrize("options", [{}, {"revive_below": 0.9}, {"init": "kmeans"}], ids=["plain", "revive", "kmeans"])
def test_separate_levels_equal_a_row_of_quantisers(options: dict[str, Any]) -> None:
    together = ResidualVQ(3, (7, 5, 6), 4, decay=0.6, channels_last=True, **options)
    row = [VectorQuantizer(size, 4, decay=0.6, channels_last=True, **options) for size in (7, 5, 6)]
    for level, quantizer in enumerate(row):
        quantizer.load_state_dict(together.quantizer(level).state_dict())
    for step in range(3):
        x = normal(3, 9, 4, seed=step)
        torch.manual_seed(step)
        out = together(x)
        torch.manual_seed(step)
        residual, total = x, torch.zeros_like(x)
        parts = []
        for quantizer in row:
            parts.append(quantizer(residual))
            residual, total = residual - parts[-1].quantized, total + parts[-1].quantized
        assert torch.equal(out.quantized, total)
        assert torch.equal(out.codes, torch.stack([part.codes for part in parts], -1))
        losses = torch.stack([part.commitment_loss for part in parts])
        assert torch.equal(out.level_losses, losses)
        assert torch.equal(out.commitment_loss, losses.sum())
        assert torch.equal(out.perplexity, torch.stack([part.perplexity for part in parts]))
        assert torch.equal(out.dead_codes, torch.stack([part.dead_codes for part in parts]))
        assert all(same(have, buffers(want)) for have, want in zip(states(together), row, strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_passes_equal_the_formulas(shared: bool) -> None:
    levels, decay, eps = 3, 0.7, 1e-5
    quantizer = ResidualVQ(levels, 6, 4, shared_codebook=shared, decay=decay, eps=eps, channels_last=True).double()
    assert len(quantizer.levels) == (1 if shared else levels)
    for step in range(3):
        before = [{name: getattr(level, name).clone() for name in STATE} for level in quantizer.levels]
        x = normal(13, 4, seed=step, dtype=F64)
        out = quantizer(x)
        residual, codes, losses = x, [], []
        counts, sums = ([torch.zeros_like(state[name]) for state in before] for name in ("cluster_size", "embedding"))
        for level in range(levels):
            own = 0 if shared else level
            codes.append(nearest(residual, before[own]["embedding"]))
            for n, code in enumerate(codes[-1]):
                counts[own][code] += 1
                sums[own][code] += residual[n]
            residual = residual - before[own]["embedding"][codes[-1]]
            losses.append(0.25 * residual.square().mean())
        assert torch.equal(out.codes, torch.stack(codes, -1))
        torch.testing.assert_close(out.quantized, x - residual)
        torch.testing.assert_close(out.level_losses, torch.stack(losses))
        for own, state in enumerate(before):
            size = decay * state["cluster_size"] + (1 - decay) * counts[own]
            total = decay * state["embedding_sum"] + (1 - decay) * sums[own]
            smoothed = (size + eps) / (size.sum() + 6 * eps) * size.sum()
            for name, value in zip(STATE, (total / smoothed[:, None], size, total), strict=True):
                torch.testing.assert_close(getattr(quantizer.levels[own], name), value)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 5)], ids=lambda s: f"{len(s) + 1}d")
def test_layouts_encoding_and_lookup(shared: bool, shape: tuple[int, ...]) -> None:
    first = ResidualVQ(4, 6, 3, shared_codebook=shared).eval()
    last = ResidualVQ(4, 6, 3, shared_codebook=shared, channels_last=True).eval()
    last.load_state_dict(first.state_dict())
    x = normal(*shape, 3)
    out, other = first(x.movedim(-1, 1)), last(x)
    assert out.codes.shape == (*shape, 4)
    assert torch.equal(out.codes, other.codes)
    assert torch.equal(out.quantized.movedim(1, -1), other.quantized)
    assert torch.equal(first.encode(x.movedim(-1, 1)), out.codes)
    assert torch.equal(first.lookup(out.codes), out.quantized)
    assert torch.equal(last.lookup(out.codes), other.quantized)
    # Fewer levels are a coarser picture; -1 adds nothing.
    coarse = last.lookup(out.codes[..., :2])
    assert torch.equal(coarse, last.lookup(torch.cat([out.codes[..., :2], torch.full((*shape, 2), -1)], -1)))
    wanted = last.quantizer(0).lookup(out.codes[..., 0]) + last.quantizer(1).lookup(out.codes[..., 1])
    assert torch.equal(coarse, wanted)


@pytest.mark.parametrize("kind", ["straight_through", "rotation"])
def test_the_gradient_passes_once_to_the_input(kind: Any) -> None:
    quantizer = ResidualVQ(5, 6, 4, gradient=kind, channels_last=True).double().eval()
    x, upstream = normal(9, 4, dtype=F64).requires_grad_(), normal(9, 4, seed=1, dtype=F64)
    out = quantizer(x)
    (found,) = torch.autograd.grad(out.quantized, x, upstream, retain_graph=True)
    if kind == "straight_through":
        assert torch.equal(found, upstream)
    else:
        scale = out.quantized.norm(dim=1) / x.norm(dim=1)
        torch.testing.assert_close(found.norm(dim=1), scale * upstream.norm(dim=1))
    # Each level's loss pulls x towards the codes so far: 2 beta r_{l+1} / numel, added over levels.
    (pull,) = torch.autograd.grad(out.commitment_loss, x)
    want, residual = torch.zeros_like(x), x.detach()
    for level in range(5):
        residual = residual - quantizer.quantizer(level).lookup(out.codes[:, level])
        want += 2 * 0.25 * residual / x.numel()
    torch.testing.assert_close(pull, want)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_dropped_levels(shared: bool) -> None:
    options: dict[str, Any] = {"shared_codebook": shared, "channels_last": True, "decay": 0.5}
    quantizer = ResidualVQ(4, 6, 3, quantize_dropout=True, quantize_dropout_min=2, **options).double()
    whole = ResidualVQ(4, 6, 3, **options).double().eval()
    whole.load_state_dict(quantizer.state_dict())
    x = normal(60, 5, 3, dtype=F64)
    codes = whole(x).codes
    out = quantizer(x)
    kept = (out.codes >= 0).sum(-1)
    # The same number for all positions of a sample; every number from 2 to 4 for some sample.
    assert torch.equal(kept.amin(1), kept.amax(1))
    assert kept.unique().tolist() == [2, 3, 4]
    present = torch.arange(4) < kept[..., None]
    assert torch.equal(out.codes, torch.where(present, codes, -1))
    torch.testing.assert_close(out.quantized, whole.lookup(out.codes))
    # A level's loss and codebook see the vectors that reach it alone.
    residual = x
    for level in range(4):
        here = present[..., level]
        residual = residual - whole.quantizer(level).lookup(codes[..., level])
        torch.testing.assert_close(out.level_losses[level], 0.25 * residual[here].square().mean())
        if not shared:
            counts = torch.bincount(codes[..., level][here], minlength=6)
            torch.testing.assert_close(quantizer.quantizer(level).cluster_size, 0.5 + 0.5 * counts.double())
    if shared:
        counts = torch.bincount(codes[present], minlength=6)
        torch.testing.assert_close(quantizer.quantizer(0).cluster_size, 0.5 + 0.5 * counts.double())
    assert (quantizer.eval()(x).codes >= 0).all()


def test_dropping_does_not_stand_in_the_way_of_initialisation() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        quantizer = ResidualVQ(5, 3, 2, init="data", quantize_dropout=True, channels_last=True)
        out = quantizer(normal(1, 9, 2, seed=seed))
        assert all(bool(level.initialized) for level in quantizer.levels)
        assert out.quantized.isfinite().all()


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("dropout", [False, True], ids=["all-levels", "dropout"])
@pytest.mark.parametrize("init", ["normal", "data", "kmeans"])
def test_masked_vectors_change_nothing(shared: bool, dropout: bool, init: Any) -> None:
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    results = []
    for filler in (7.0, float("nan")):
        torch.manual_seed(3)
        quantizer = ResidualVQ(
            3, 6, 2, shared_codebook=shared, quantize_dropout=dropout, init=init, revive_below=0.9, channels_last=True
        )
        for seed in range(3):
            x = torch.where(mask[..., None], normal(4, 9, 2, seed=seed), filler).requires_grad_()
            out = quantizer(x, mask)
            (grad,) = torch.autograd.grad(out.quantized.square().sum() + out.loss, x)
            results.append((*out, grad, states(quantizer)))
        assert (out.codes[~mask] == -1).all()
        assert (out.codes[mask][:, 0] >= 0).all()
        assert (out.quantized[~mask] == 0).all()
        assert (grad[~mask] == 0).all()
    for left, right in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_a_shared_codebook_is_revived_from_the_residuals_of_all_levels() -> None:
    quantizer = ResidualVQ(3, 80, 2, shared_codebook=True, decay=0.5, revive_below=1.3, channels_last=True)
    before, x = quantizer.quantizer(0).embedding.clone(), normal(40, 2)
    out = quantizer(x)
    residuals = [x]
    for level in range(2):
        residuals.append(residuals[-1] - before[out.codes[:, level]])
    only = quantizer.quantizer(0)
    revived = only.embedding[only.cluster_size == torch.tensor(1.3)]
    assert len(revived) > 20
    assert is_row_of(revived, torch.cat(residuals))
    assert all(any(is_row_of(code[None], part) for code in revived) for part in residuals)


def test_learnable_codebooks() -> None:
    for shared, count in ((False, 3), (True, 1)):
        quantizer = ResidualVQ(3, 6, 2, shared_codebook=shared, learnable_codebook=True, channels_last=True)
        assert len(list(quantizer.parameters())) == count
        out = quantizer(normal(40, 2))
        out.loss.backward()
        torch.testing.assert_close(0.25 * out.codebook_loss, out.commitment_loss)
        assert all((parameter.grad != 0).any() for parameter in quantizer.parameters())


def test_freezing_and_evaluation_change_nothing() -> None:
    quantizer = ResidualVQ(3, 6, 2, quantize_dropout=True, revive_below=0.5, channels_last=True)
    before = states(quantizer)
    quantizer(normal(9, 2), freeze_codebook=True)
    quantizer.eval()(normal(9, 2))
    quantizer.encode(normal(9, 2))
    assert all(same(have, want) for have, want in zip(states(quantizer), before, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_input_keeps_float32_residuals(autocast: bool) -> None:
    wide = ResidualVQ(4, 6, 3)
    narrow = copy.deepcopy(wide)
    x = normal(2, 3, 9).bfloat16().requires_grad_()
    want = wide(x.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = narrow(x)
    assert torch.equal(out.codes, want.codes)
    assert torch.equal(out.quantized, want.quantized.bfloat16())
    assert torch.equal(out.level_losses, want.level_losses)
    out.quantized.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_copies_go_on_alike(shared: bool) -> None:
    quantizer = ResidualVQ(3, 6, 2, shared_codebook=shared, init="kmeans", channels_last=True)
    quantizer(normal(30, 2))
    loaded = ResidualVQ(3, 6, 2, shared_codebook=shared, init="kmeans", channels_last=True)
    loaded.load_state_dict(quantizer.state_dict())
    others = [copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), loaded]
    for one in (quantizer, *others):
        one(normal(30, 2, seed=1))
    for one in others:
        assert all(same(have, want) for have, want in zip(states(one), states(quantizer), strict=True))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_quantizers": 0}, ArgumentError, "num_quantizers: must be at least 1, got 0"),
        ({"num_quantizers": 2.0}, ArgumentTypeError, "num_quantizers: expected an int, got float"),
        ({"num_codes": (4, 5)}, ArgumentError, "num_codes: expected one for each of 3 levels, got 2"),
        ({"num_codes": (4, 4, 5), "shared_codebook": True}, ArgumentError, "num_codes: expected a single number"),
        ({"num_codes": 0}, ArgumentError, "num_codes: must be at least 1, got 0"),
        ({"shared_codebook": 1}, ArgumentTypeError, "shared_codebook: expected a bool, got int 1"),
        ({"quantize_dropout": 0.5}, ArgumentTypeError, "quantize_dropout: expected a bool, got float 0.5"),
        ({"quantize_dropout_min": 0}, ArgumentError, "quantize_dropout_min: must be at least 1, got 0"),
        ({"quantize_dropout_min": 4}, ArgumentError, "quantize_dropout_min: expected at most num_quantizers, 3, got 4"),
        ({"gradient": "none"}, ArgumentError, "gradient: expected one of 'straight_through', 'rotation', got 'none'"),
        ({"heads": 2}, ArgumentError, "heads: a residual quantiser has no heads, got 2"),
        ({"metric": "l1"}, ArgumentError, "metric: expected one of 'euclidean', 'cosine', got 'l1'"),
    ],
    ids=lambda value: f"{value}" if isinstance(value, dict) else None,
)
def test_refuses_settings(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with refuses(error, message):
        ResidualVQ(**{"num_quantizers": 3, "num_codes": 4, "code_dim": 2, **fields})


def test_refuses_input_and_codes() -> None:
    quantizer = ResidualVQ(3, 6, 2)
    for call in (quantizer, quantizer.encode):
        with refuses(ArgumentError, r"x: expected 2 channels along axis 1, got shape \[4, 3\]"):
            call(torch.zeros(4, 3))
        with refuses(ArgumentTypeError, "x: expected a floating-point tensor, got torch.int64"):
            call(torch.zeros(4, 2).long())
        with refuses(ArgumentError, r"mask: expected shape \[4\], got \[5\]"):
            call(torch.zeros(4, 2), torch.ones(5, dtype=torch.bool))
    with refuses(ArgumentError, r"codes: expected a last axis of 1 to 3 levels, got shape \[2, 4\]"):
        quantizer.lookup(torch.zeros(2, 4, dtype=torch.int64))
    with refuses(ArgumentError, "codes: values must lie in 0..5, got 6"):
        quantizer.lookup(torch.full((2, 3), 6))


def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels one after the other, whatever the options."""
    monkeypatch.setattr("fastvq.models.quantizer.residual.why_in_turn", lambda *given, **_: "the test says so")


@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_codebook": True},
        {"quantize_dropout": True, "quantize_dropout_min": 2},
        {"quantize_dropout": True, "shared_codebook": True},
        {"learnable_codebook": True},
        {"learnable_codebook": True, "shared_codebook": True},
        {"gradient": "rotation", "commitment": 0.5},
        {"init": "kmeans"},
        {"revive_below": 0.9},
        {"metric": "cosine"},
        {"check_finite": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_gives_what_the_levels_in_turn_give(
    options: dict[str, Any], mask: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    one = ResidualVQ(4, 40, 6, decay=0.6, **options)
    other = copy.deepcopy(one)
    real = torch.rand(8, 9, 5) > 0.3 if mask else None
    results: list[list[Any]] = [[], []]
    for step in range(3):
        for quantizer, kept in zip((one, other), results, strict=True):
            with monkeypatch.context() as patch:
                if quantizer is other:
                    in_turn(patch)
                x = normal(8, 6, 9, 5, seed=step).to(dtype).requires_grad_()
                torch.manual_seed(step)
                out = quantizer(x, real)
                (out.quantized.float().square().sum() + out.loss).backward()
                quantizer.eval()
                with torch.no_grad():
                    kept.append((*out, quantizer.encode(x, real), *quantizer(x, real)))
                kept.append(tuple(p.grad for p in quantizer.parameters()))
                kept.append(x.grad)
                quantizer.train()
    for found, expected in zip(*results, strict=True):
        if isinstance(found, tuple):
            assert all(torch.equal(value, want) for value, want in zip(found, expected, strict=True))
        else:
            # The levels' pulls are added up in another order.
            torch.testing.assert_close(found, expected)
    moved = other.state_dict()
    assert all(torch.equal(value, moved[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metric": "cosine"}, "metric is 'cosine': each level scales its residual"),
        ({"check_finite": True}, "check_finite looks at each level's residual"),
        ({"revive_below": 1.0}, "revive_below asks for each level's residual"),
        ({"init": "data"}, "init is 'data', and codes have not started yet"),
        ({"num_codes": (5, 6, 7)}, "levels differ in the size or type of their codebooks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_it_says_why_levels_are_taken_in_turn(options: dict[str, Any], reason: str) -> None:
    x = normal(10, 4)
    quantizer = ResidualVQ(3, options.pop("num_codes", 5), 4, **options)
    assert quantizer.explain(x) == f"levels in turn: {reason}"
    if {"revive_below", "init"} & set(options):
        assert quantizer.explain(x, freeze_codebook=True).startswith("one pass\n")


def test_it_says_when_all_levels_are_one_pass() -> None:
    x, quantizer = normal(10, 4), ResidualVQ(3, 5, 4)
    assert "chosen: the first that can run" in quantizer.explain(x)
    with torch.no_grad():
        assert quantizer.explain(x).startswith("levels in turn: the pass may be repeated in backward")
    quantizer.levels[1].mode = "fast"  # type: ignore[assignment]
    assert quantizer.explain(x) == "levels in turn: levels differ in mode or deterministic"
    quantizer.levels[0].register_forward_hook(lambda *given: None)
    assert quantizer.explain(x) == "levels in turn: a level has a forward of its own, or hooks"
