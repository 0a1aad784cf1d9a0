"""What does not change the codes: the call, the micro-batch, threads, instruction sets; and what the engines run in."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_helpers import (
    CACHED,
    engine_logits,
    given_to,
    grids,
    model_logits,
    needs_extension,
    part,
    request_of,
    require_kernels,
    require_logits,
    require_same_codes,
    rounded,
    spread,
)
from helpers import pixelcnn, snail
from interop_helpers import foreign_prior
from scipy.stats import chi2
from torch import Tensor

import fastvq
from fastvq.interop import convert
from fastvq.models import Prior
from fastvq.sampling import EngineOptions, Pipeline, sample, uniforms
from fastvq.sampling.engines import fill
from fastvq.sampling.plan import compile_plan

pytestmark = [
    pytest.mark.usefixtures("steady"),
    needs_extension,
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated"),
]

FIELDS: dict[str, Any] = {"shape": (6, 7), "num_codes": 17, "channels": 36, "level": 1}
PRIORS: dict[str, Callable[..., Prior]] = {
    "strict": lambda **c: snail(**{**FIELDS, "residual_channels": 20, "blocks": 2, "layers_per_block": 2, **c}),
    "inclusive": lambda **c: snail(**{**FIELDS, "mask": "inclusive", "activation": "concat_elu", **c}),
    "pixelcnn": lambda **c: pixelcnn(**{**FIELDS, "layers": 2, **c}),
}
every_kind = pytest.mark.parametrize("kind", PRIORS)
every_engine = pytest.mark.parametrize("engine", CACHED)


def conditioned(kind: str) -> tuple[Prior, dict[str, Any]]:
    prior = spread(PRIORS[kind](num_classes=3, condition_shapes=((3, 7),), condition_num_codes=(4,)))
    return prior, given_to(prior, 64)


# Bit for bit.


@every_kind
@pytest.mark.parametrize(("engine", "micro_batch"), [("cpu", 1), ("cpu", 4), ("cpu", 7), ("torch", 4)])
def test_a_sample_does_not_depend_on_the_call(engine: str, kind: str, micro_batch: int) -> None:
    prior, given = conditioned(kind)

    def codes(start: int, n: int) -> Tensor:
        return sample(prior, n, seed=9, start=start, micro_batch=micro_batch, engine=engine, **part(given, start, n))

    whole = codes(0, 19)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 19
    for cuts in ([0, 1, 19], [0, 3, 8, 16, 19], [0, 2, 11, 18, 19]):
        parts = [codes(first, last - first) for first, last in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)


@every_kind
@every_engine
def test_logits_do_not_depend_on_the_neighbours(engine: str, kind: str) -> None:
    prior, given = conditioned(kind)
    given = part(given, 0, 5)
    codes, _ = grids(prior, 5, seed=1)
    others, _ = grids(prior, 5, seed=2)
    others[3] = codes[3]
    assert torch.equal(*(engine_logits(engine, prior, grid, given)[3] for grid in (codes, others)))


@every_kind
def test_logits_do_not_depend_on_threads(kind: str) -> None:
    prior, given = conditioned(kind)
    given = part(given, 0, 5)
    codes, _ = grids(prior, 5)
    one = engine_logits("cpu", prior, codes, given, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(engine_logits("cpu", prior, codes, given, threads=threads), one)


@pytest.mark.parametrize("kernels", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("bf16", [False, True])
@every_kind
def test_the_step_phase_does_not_depend_on_the_batch(kind: str, kernels: str, bf16: bool) -> None:
    """On a grid of one row there are no rows above, and so no library products over them.

    Without attention no activation of the background is worked out beforehand: PyTorch rounds it differently by place.
    """
    require_kernels(kernels)
    prior = spread(PRIORS[kind](shape=(1, 20), **({"attention": False} if kind == "inclusive" else {})))
    codes, _ = grids(prior, 64)
    whole = engine_logits("cpu", prior, codes, {}, kernels=kernels, bf16=bf16)
    for batch in (1, 2, 3, 8, 13, 25, 33):
        assert torch.equal(engine_logits("cpu", prior, codes[:batch], {}, kernels=kernels, bf16=bf16), whole[:batch])


# Up to certified margins.


@functools.cache
def reference(kind: str) -> tuple[Prior, dict[str, Any], Tensor]:
    prior, given = conditioned(kind)
    return prior, given, sample(prior, 64, seed=4, engine="naive", micro_batch=64, **given)


@every_kind
@every_engine
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8, 17, 64])
def test_micro_batches(
    engine: str, kind: str, micro_batch: int, record_property: Callable[[str, object], None]
) -> None:
    prior, given, naive = reference(kind)
    n = 64 if engine == "cpu" else 12
    given, naive = part(given, 0, n), naive[:n]
    found = sample(prior, n, seed=4, engine=engine, micro_batch=micro_batch, **given)
    share = require_same_codes(prior, found, naive, uniforms(4, 0, n, (6, 7), level=1), given)
    record_property("identical_grids", share)
    print(f"{kind}, {engine}, micro-batch {micro_batch}: {share:.1%} of grids identical to the naive sampler's")
    assert share > 0.9


@every_kind
@pytest.mark.parametrize("kernels", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("threads", [1, 2])
def test_instruction_sets(
    kind: str, kernels: str, threads: int, record_property: Callable[[str, object], None]
) -> None:
    require_kernels(kernels)
    prior, given, naive = reference(kind)
    noise = uniforms(4, 0, 64, (6, 7), level=1)
    request = request_of(prior, 64, given, noise=noise)
    options = EngineOptions(kernels=kernels, threads=threads)
    found = fill("cpu", prior, request, lambda *_: None, options)
    share = require_same_codes(prior, found, naive, noise, given)
    record_property("identical_grids", share)
    print(f"{kind}, {kernels}, {threads} threads: {share:.1%} of grids identical to the naive sampler's")
    assert share > 0.9
    codes, _ = grids(prior, 5)
    require_logits("cpu", prior, codes, part(given, 0, 5), kernels=kernels, threads=threads)


# Weights in bfloat16.


@every_kind
def test_bfloat16_rounds_the_weights_of_products_and_nothing_else(kind: str) -> None:
    prior, given = conditioned(kind)
    given = part(given, 0, 5)
    codes, _ = grids(prior, 5)
    wanted = engine_logits("torch", prior, codes, given, plan=rounded(compile_plan(prior)))
    found = engine_logits("cpu", prior, codes, given, bf16=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(found, engine_logits("cpu", prior, codes, given), rtol=1e-4, atol=1e-4)


@every_kind
def test_bfloat16_is_near(kind: str, record_property: Callable[[str, object], None]) -> None:
    """Rounding moves a weight by at most 2^-9 of itself.

    Through some ten layers, with errors that add like noise, logits of standard deviation 3 move by some hundredths;
    the divergence is half the variance of that, less than 1e-2 nats even at the worst position.
    """
    prior, given = conditioned(kind)
    codes = sample(prior, 64, seed=2, engine="cpu", **given)
    exact = model_logits(copy.deepcopy(prior).double(), codes, given).log_softmax(-1)
    found = engine_logits("cpu", prior, codes, given, bf16=True).double().log_softmax(-1)
    nll = (exact - found).gather(-1, codes.unsqueeze(-1)).mean()
    divergence = (exact.exp() * (exact - found)).sum(-1)
    record_property("nll_difference", float(nll))
    record_property("largest_divergence", float(divergence.max()))
    print(f"{kind}: NLL {float(nll):+.1e} nats, KL mean {divergence.mean():.1e}, max {divergence.max():.1e}")
    assert abs(float(nll)) < 1e-3
    assert divergence.mean() < 5e-4
    assert divergence.max() < 1e-2


# What a prior says is what is drawn.


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("variant", ["torch", "cpu", "cpu-bfloat16"])
def test_frequencies(kind: str, variant: str) -> None:
    """All 81 grids of 2 x 2 positions and 3 codes, against their probabilities in float64."""
    engine, _, precision = variant.partition("-")
    n = 20_000
    prior = spread(PRIORS[kind](shape=(2, 2), num_codes=3), units=1.0)
    every = torch.cartesian_prod(*[torch.arange(3)] * 4).view(81, 2, 2)
    with torch.no_grad():
        expected = n * (-copy.deepcopy(prior).double().nll(every).sum((1, 2))).exp()
    assert float(expected.sum()) == pytest.approx(n)
    chosen: dict[str, Any] = {"engine": engine, "precision": precision or "float32", "micro_batch": 1000}
    codes = sample(prior, n, seed=6, **chosen).flatten(1)
    found = torch.bincount((codes * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
    large = expected >= 5
    cells = torch.cat([expected[large], expected[~large].sum()[None]])
    counts = torch.cat([found[large], found[~large].sum()[None]])
    kept = cells > 0
    statistic = float(((counts - cells).square() / cells)[kept].sum())
    assert int(large.sum()) > 20
    assert chi2.sf(statistic, int(kept.sum()) - 1) > 1e-3


# What the engines run in.


@every_engine
def test_the_shipped_pipeline(engine: str) -> None:
    pipeline = Pipeline.from_pretrained("digits")
    found = pipeline.sample(6, label=torch.arange(6), seed=3, engine=engine)
    above: tuple[Tensor, ...] = ()
    for level, (prior, codes) in enumerate(zip(pipeline.priors, found.codes, strict=True)):
        given: dict[str, Any] = {"condition": above, "label": torch.arange(6)}
        naive = sample(prior, 6, seed=3, engine="naive", **given)
        noise = uniforms(3, 0, 6, prior.config.shape, level=level)
        assert require_same_codes(prior, codes, naive, noise, given) > 0.8
        above = (*above, codes)
    assert found.images.shape[0] == 6


@every_engine
@pytest.mark.parametrize("inplace", [False, True])
def test_a_prior_of_another_project(engine: str, inplace: bool) -> None:
    theirs: Any = foreign_prior(inplace=inplace)
    drawn = []
    for _ in range(3):
        ours = convert(theirs)
        assert isinstance(ours, Prior)
        codes = fastvq.sample(theirs, 6, seed=1, engine=engine)
        naive = sample(ours, 6, seed=1, engine="naive")
        assert require_same_codes(ours, codes, naive, uniforms(1, 0, 6, ours.config.shape), {}) > 0.6
        drawn.append(codes)
        theirs(codes)[0].square().mean().backward()
        torch.optim.Adam(theirs.parameters(), lr=0.1).step()
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@every_engine
def test_autocast_around_it_changes_nothing(engine: str) -> None:
    prior = spread(PRIORS["strict"]())
    wanted = sample(prior, 8, seed=1, engine=engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sample(prior, 8, seed=1, engine=engine), wanted)


@every_engine
def test_priors_in_other_precisions(engine: str) -> None:
    """Plans are float32 whatever the weights are stored in."""
    prior = spread(PRIORS["strict"]()).bfloat16()
    wanted = sample(copy.deepcopy(prior).float(), 8, seed=1, engine=engine)
    assert torch.equal(sample(prior, 8, seed=1, engine=engine), wanted)


@every_engine
def test_training_mode_comes_back(engine: str) -> None:
    prior = spread(PRIORS["strict"](dropout=0.5, attention_dropout=0.5))
    wanted = sample(prior, 4, seed=1, engine=engine)
    prior.train()
    assert torch.equal(sample(prior, 4, seed=1, engine=engine), wanted)
    assert all(module.training for module in prior.modules())
    codes = sample(prior, 4, seed=1, engine=engine)
    assert not codes.is_inference()
    prior.nll(codes).mean().backward()
