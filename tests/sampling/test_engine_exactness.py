"""Cached engines against the model: logits at every position, and the same codes at the same uniform numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_helpers import CACHED, grids, needs_extension, require_kernels, require_logits, require_same_codes, spread
from helpers import pixelcnn, random_codes, snail
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvq.models import GatedPixelCNNConfig, PixelSNAILConfig, Prior, build
from fastvq.sampling import sample, uniforms

pytestmark = [pytest.mark.usefixtures("steady"), needs_extension]

# One seed for all: an architecture that fails is found again, and not on some machines only.
drawn = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHANNELS = (4, 8, 12, 20, 33, 36, 70)
SHAPES = ((1, 1), (1, 7), (6, 1), (2, 9), (3, 4), (5, 6))


@st.composite
def common(draw: st.DrawFn) -> dict[str, Any]:
    """What every kind of prior has: a grid, codes, levels above, labels."""
    height, width = draw(st.sampled_from(SHAPES))
    above = [[], [(height, width)], [(1, 1), (height, width)]]
    if height % 2 == 0:
        above.append([(height // 2, width)])
    shapes = tuple(draw(st.sampled_from(above)))
    return {
        "shape": (height, width),
        "num_codes": draw(st.sampled_from((2, 5, 17, 40))),
        "num_classes": draw(st.sampled_from((None, None, 3))),
        "condition_shapes": shapes,
        "condition_num_codes": (4,) * len(shapes),
        "condition_channels": draw(st.sampled_from((4, 9))),
        "condition_blocks": 1,
    }


@st.composite
def pixelsnails(draw: st.DrawFn) -> PixelSNAILConfig:
    heads = draw(st.sampled_from((1, 2)))
    activation: Any = draw(st.sampled_from(("elu", "concat_elu")))
    return PixelSNAILConfig(
        **draw(common()),
        channels=draw(st.sampled_from(CHANNELS)),
        residual_channels=draw(st.sampled_from(CHANNELS)),
        kernel_size=draw(st.integers(2, 7)),
        form=draw(st.sampled_from(("rows", "symmetric"))),
        mask=draw(st.sampled_from(("strict", "inclusive"))),
        blocks=draw(st.integers(1, 4)),
        layers_per_block=draw(st.integers(0, 2)),
        attention=draw(st.booleans()),
        attention_heads=heads,
        attention_channels=heads * draw(st.sampled_from((1, 5, 16, 18))),
        output_blocks=draw(st.integers(0, 2)),
        activation=activation,
        legacy_skip=activation == "elu" and draw(st.booleans()),
    )


@st.composite
def pixelcnns(draw: st.DrawFn) -> GatedPixelCNNConfig:
    return GatedPixelCNNConfig(
        **draw(common()),
        channels=draw(st.sampled_from(CHANNELS)),
        layers=draw(st.integers(0, 3)),
        kernel_size=draw(st.sampled_from((3, 5))),
        output_channels=draw(st.sampled_from(CHANNELS)),
    )


def prior_of(config: PixelSNAILConfig | GatedPixelCNNConfig, seed: int) -> Prior:
    torch.manual_seed(seed)
    prior = build(config)
    assert isinstance(prior, Prior)
    return spread(prior, seed)


@settings(drawn, max_examples=100)
@given(config=pixelsnails(), seed=st.integers(0, 2**31), threads=st.sampled_from((1, 2)))
def test_logits_of_pixelsnail(config: PixelSNAILConfig, seed: int, threads: int) -> None:
    prior = prior_of(config, seed)
    codes, given_too = grids(prior, 3, seed)
    require_logits("torch", prior, codes, given_too)
    require_logits("cpu", prior, codes, given_too, threads=threads)


@settings(drawn, max_examples=40)
@given(config=pixelcnns(), seed=st.integers(0, 2**31), threads=st.sampled_from((1, 2)))
def test_logits_of_gated_pixelcnn(config: GatedPixelCNNConfig, seed: int, threads: int) -> None:
    prior = prior_of(config, seed)
    codes, given_too = grids(prior, 3, seed)
    require_logits("torch", prior, codes, given_too)
    require_logits("cpu", prior, codes, given_too, threads=threads)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("kernels", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("kind", ["elu", "concat_elu", "pixelcnn"])
def test_small_features_keep_their_digits(kind: str, kernels: str, scale: float) -> None:
    """Features so small that exp(x) - 1 would be rounding alone, under an output layer that makes up for it."""
    require_kernels(kernels)
    prior: Any = pixelcnn(layers=2) if kind == "pixelcnn" else snail(attention=False, activation=kind, channels=20)
    spread(prior)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if name.startswith("input") or name.endswith("bias") or "link" in name:
                parameter.mul_(scale)
        if kind != "pixelcnn":
            prior.blocks[0].mix.weight[:, -2:].mul_(scale)
    codes, _ = grids(prior, 3)
    with torch.no_grad():
        prior.output.weight.mul_(3 / prior(codes).std())
    require_logits("torch", prior, codes, {})
    require_logits("cpu", prior, codes, {}, kernels=kernels)


def differences(prior: Prior, n: int, seed: int, given_too: dict[str, Any], **options: Any) -> dict[str, float]:
    """Shares of grids that are identical to those of the naive sampler, by engine; the others are certified."""
    config = prior.config
    noise = uniforms(seed, 0, n, config.shape, level=config.level)
    naive = sample(prior, n, seed=seed, engine="naive", **given_too, **options)
    plain = {key: options[key] for key in ("temperature", "top_k", "top_p") if key in options}
    known = options.get("mask")
    if known is not None:
        known = known.expand(noise.shape)
    return {
        engine: require_same_codes(
            prior,
            sample(prior, n, seed=seed, engine=engine, **given_too, **options),
            naive,
            noise,
            given_too,
            known=known,
            **plain,
        )
        for engine in CACHED
    }


@settings(drawn, max_examples=15)
@given(config=st.one_of(pixelsnails(), pixelcnns()), seed=st.integers(0, 2**31))
def test_codes_are_those_of_the_naive_sampler(config: Any, seed: int) -> None:
    prior = prior_of(dataclasses.replace(config, level=seed % 3), seed)
    _, given_too = grids(prior, 5, seed)
    differences(prior, 5, seed, given_too)


BOTH = {
    "strict": lambda: snail(blocks=2, layers_per_block=2, channels=20, num_codes=17, shape=(5, 6)),
    "inclusive": lambda: snail(mask="inclusive", activation="concat_elu", channels=12, num_codes=17, shape=(5, 6)),
    "pixelcnn": lambda: pixelcnn(layers=2, num_codes=17, shape=(5, 6)),
}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (4, 0.9), (1, None), (17, 1.0)])
def test_settings(kind: str, temperature: float, top_k: int | None, top_p: float | None) -> None:
    chosen: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    shares = differences(spread(BOTH[kind]()), 3, 5, {}, **chosen)
    # Rounding decides about one code in 10**5; that it does for more than one of 3 grids is out of the question.
    assert min(shares.values()) > 0.6


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("each", [False, True], ids=["one-mask", "a-mask-each"])
def test_inpainting(kind: str, share: float, each: bool) -> None:
    prior = spread(BOTH[kind]())
    shape = (6, 5, 6) if each else (5, 6)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share
    init = random_codes(6, 5, 6, num_codes=17, seed=8)
    shares = differences(prior, 6, 5, {}, init_codes=init, mask=mask)
    assert min(shares.values()) > 0.6
    for engine in CACHED:
        codes = sample(prior, 6, seed=5, engine=engine, init_codes=init, mask=mask)
        assert torch.equal(codes[mask.expand(6, 5, 6)], init[mask.expand(6, 5, 6)])


@pytest.mark.parametrize("kind", BOTH)
def test_excluded_codes_are_never_drawn(kind: str) -> None:
    prior: Any = spread(BOTH[kind]())
    with torch.no_grad():
        prior.output.bias[3:].fill_(float("-inf"))
    naive = sample(prior, 6, seed=1, engine="naive")
    assert naive.max() == 2
    for engine in CACHED:
        assert torch.equal(sample(prior, 6, seed=1, engine=engine), naive)
