"""The cpu engine: logits and codes are the same bits whatever is sampled beside them, in whatever order and threads."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from engine_helpers import given_to, needs_extension, part, request_of, require_same_codes, spread
from helpers import pixelcnn, snail
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_exactness import drawn, pixelsnails, prior_of
from torch import Tensor

import fastvq
from fastvq.errors import ArgumentError
from fastvq.models import PixelSNAILConfig, Prior
from fastvq.sampling import EngineOptions, sample, uniforms
from fastvq.sampling.engines.context import fixed_statics
from fastvq.sampling.engines.cpu import CpuPlan
from fastvq.sampling.plan import compile_plan

pytestmark = [pytest.mark.usefixtures("steady"), needs_extension]

TOLD: dict[str, Any] = {"condition_shapes": ((3, 7),), "condition_num_codes": (5,), "num_classes": 3, "level": 1}
# Channels that are multiples of no vector, and grids of no tile.
KINDS: dict[str, Any] = {
    "strict": lambda: snail(shape=(6, 7), channels=20, residual_channels=13, attention=False, **TOLD),
    "inclusive": lambda: snail(
        shape=(6, 7), channels=33, attention=False, mask="inclusive", activation="concat_elu", **TOLD
    ),
    "wide-kernel": lambda: snail(shape=(5, 9), kernel_size=5, layers_per_block=2, attention=False, num_classes=3),
    "attention": lambda: snail(shape=(6, 7), channels=20, **TOLD),
    "pixelcnn": lambda: pixelcnn(shape=(6, 7), channels=19, layers=2, **TOLD),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def run(
    prior: Prior, n: int, told: dict[str, Any], *, tile: int, threads: int = 1, **packing: Any
) -> tuple[Tensor, Tensor]:
    """Codes and logits."""
    plan = compile_plan(prior)
    request = request_of(prior, n, told, seed=3)
    logits = torch.full((n, *plan.shape, plan.num_codes), float("nan"))
    with torch.inference_mode():
        codes = CpuPlan(plan, **packing).fill(
            request,
            fixed_statics(prior, request),
            plan.front(tile),
            lambda *_: None,
            threads=threads,
            logits=logits,
        )
    return codes, logits


def tiles(prior: Prior) -> list[int]:
    width = prior.config.shape[1]
    return [width] if compile_plan(prior).skew is None else [1, 2, 3, width - 1, width]


@every_kind
@pytest.mark.parametrize("bf16", [False, True])
def test_tiles_threads_and_batches(kind: str, bf16: bool) -> None:
    prior = spread(KINDS[kind]())
    told = given_to(prior, 9)
    codes, logits = run(prior, 9, told, tile=prior.config.shape[1], bf16=bf16)
    assert logits.isfinite().all()
    assert len(torch.unique(codes.flatten(1), dim=0)) == 9
    for tile, threads in itertools.product(tiles(prior), [1, 2, 3, 7]):
        found, values = run(prior, 9, told, tile=tile, threads=threads, bf16=bf16)
        assert torch.equal(found, codes), (tile, threads)
        assert torch.equal(values, logits), (tile, threads)
    for n, tile in itertools.product([1, 2, 5], tiles(prior)):
        found, values = run(prior, n, part(told, 0, n), tile=tile, threads=2, bf16=bf16)
        assert torch.equal(found, codes[:n]), (n, tile)
        assert torch.equal(values, logits[:n]), (n, tile)


@settings(drawn, max_examples=50)
@given(
    config=pixelsnails(),
    shape=st.sampled_from(((1, 8), (8, 1), (5, 4), (9, 5), (4, 8), (6, 6))),
    seed=st.integers(0, 2**31),
    threads=st.sampled_from((1, 2, 3)),
)
def test_any_architecture_along_any_front(
    config: PixelSNAILConfig, shape: tuple[int, int], seed: int, threads: int
) -> None:
    levels = ((1, 1), (shape[0], 1))[: len(config.condition_shapes)]
    prior = prior_of(dataclasses.replace(config, shape=shape, attention=False, condition_shapes=levels), seed)
    told = given_to(prior, 3)
    codes, logits = run(prior, 3, told, tile=shape[1])
    assert logits.isfinite().all()
    # Raster order is right, and the others are the same.
    require_same_codes(prior, codes, sample(prior, 3, seed=3, engine="naive", **told), uniforms(3, 0, 3, shape), told)
    fronts = range(1, shape[1]) if compile_plan(prior).skew is not None else []
    for tile in fronts:
        found, values = run(prior, 3, told, tile=tile, threads=threads)
        assert torch.equal(found, codes), tile
        assert torch.equal(values, logits), tile


@every_kind
def test_instruction_sets_that_fuse_agree(kind: str) -> None:
    prior = spread(KINDS[kind]())
    told = given_to(prior, 3)
    found = []
    for kernels in ("avx2", "avx512"):
        try:
            plan = CpuPlan(compile_plan(prior), kernels=kernels)
        except ArgumentError:
            pytest.skip(f"this processor has no {kernels}")
        assert plan.native.fused
        found.append(run(prior, 3, told, tile=tiles(prior)[0], threads=2, kernels=kernels))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@every_kind
def test_calls_and_micro_batches(kind: str) -> None:
    """What a user sees: any cut of the samples, any micro-batch and number of threads, and no padding."""
    prior = spread(KINDS[kind]())
    told = given_to(prior, 64)

    def codes(start: int, stop: int, **more: Any) -> Tensor:
        n = stop - start
        return sample(prior, n, seed=5, start=start, engine="cpu", **part(told, start, n), **more)

    whole = codes(0, 64)
    for micro_batch in (1, 3, 8, 64):
        assert torch.equal(codes(0, 64, micro_batch=micro_batch), whole)
    for start, stop in [(0, 1), (1, 2), (7, 20), (63, 64)]:
        assert torch.equal(codes(start, stop), whole[start:stop])
    for threads in (1, 2, 3, 7):
        assert torch.equal(codes(0, 10, options=EngineOptions(threads=threads)), whole[:10])


def test_the_digits_prior_of_the_package() -> None:
    prior = fastvq.Pipeline.from_pretrained("digits").priors[0]
    label = torch.arange(40) % 10
    whole = sample(prior, 40, seed=1, label=label)
    for n in (1, 2, 17):
        assert torch.equal(sample(prior, n, seed=1, label=label[:n]), whole[:n])


def test_a_front_that_is_too_steep_is_refused() -> None:
    """Positions that wait for too little are noticed before anything is read that is not there yet."""
    prior = KINDS["wide-kernel"]()
    plan = compile_plan(prior)
    front = plan.front(1)
    native = CpuPlan(plan).native
    assert native.memory_bytes(1, 1, front.offset) > 0
    with pytest.raises(ValueError, match="offset: a position would be read before it is known"):
        native.memory_bytes(1, 1, front.offset - 1)
