"""Sampling along a front: its arithmetic, the skew that a plan finds, and that nothing depends on the tile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_helpers import given_to, grids, request_of, require_logits, require_same_codes, spread
from helpers import pixelcnn, random_codes, refuses, snail
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_priors import GIVEN, every_given
from test_engine_exactness import drawn, pixelsnails, prior_of

import fastvq
from fastvq.errors import ArgumentError
from fastvq.models import PixelSNAIL, PixelSNAILConfig, Prior
from fastvq.sampling import EngineOptions, sample, uniforms
from fastvq.sampling.engines import fill, static_inputs
from fastvq.sampling.engines.pytorch import TorchGrid, TorchPlan, front_of, sample_torch
from fastvq.sampling.plan import Front, Plan, compile_plan
from fastvq.sampling.request import Settings

pytestmark = pytest.mark.usefixtures("steady")

# Higher than what is kept of a grid, of odd widths, and with kernels as wide as the grid.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "strict": {"shape": (9, 5), "layers_per_block": 2},
    "strict-wide": {"shape": (6, 7), "kernel_size": 5, "blocks": 2, "output_blocks": 1},
    "strict-even": {"shape": (7, 6), "kernel_size": 4, "layers_per_block": 2},
    "inclusive": {"shape": (8, 6), "mask": "inclusive", "layers_per_block": 2},
    "inclusive-two": {"shape": (8, 5), "mask": "inclusive", "kernel_size": 2, "blocks": 2},
    "symmetric": {"shape": (7, 6), "mask": "inclusive", "form": "symmetric", "kernel_size": 5},
    "clipped": {"shape": (6, 5), "kernel_size": 7, "activation": "concat_elu"},
    "nearly-raster": {"shape": (4, 6), "kernel_size": 9, "legacy_skip": True},
}
every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)


def without_attention(told: str = "alone", **changes: Any) -> PixelSNAIL:
    """With levels above that fit the grid."""
    fields = {"shape": (3, 4), **changes, **GIVEN[told]}
    if "condition_shapes" in fields:
        levels = len(fields["condition_shapes"])
        fields["condition_shapes"] = ((1, 1), (fields["shape"][0], 1))[-levels:]
    return snail(attention=False, **fields)


def skew_of(prior: Prior) -> int:
    found = compile_plan(prior).skew
    assert found is not None
    return found


# The order.


@pytest.mark.parametrize(
    ("tile", "steps", "dependent"), [(1, 253, 253), (2, 158, 316), (4, 142, 568), (8, 134, 1072), (64, 64, 4096)]
)
def test_steps(tile: int, steps: int, dependent: int) -> None:
    front = Front((64, 64), 3, tile)
    assert (front.steps, front.dependent_steps) == (steps, dependent)
    assert front.rows == {1: 22, 2: 16, 4: 8, 8: 4, 64: 1}[tile]


@st.composite
def fronts(draw: st.DrawFn) -> Front:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    return Front((height, width), draw(st.integers(1, width)), draw(st.integers(1, width)))


@settings(drawn, max_examples=300)
@given(front=fronts())
def test_any_front(front: Front) -> None:
    """Every position once, after all that it may read: rows above in earlier steps, its own row before it."""
    height, width = front.shape
    when: dict[tuple[int, int], tuple[int, int]] = {}
    for step in range(front.steps):
        active = list(front.active(step))
        assert active
        assert [row for row, _ in active] == sorted({row for row, _ in active})
        assert active[-1][0] - active[0][0] < front.rows
        for row, columns in active:
            for turn, column in enumerate(columns):
                assert (row, column) not in when
                when[row, column] = (step, turn)
        complete = [sum((row, column) in when for column in range(width)) == width for row in range(height)]
        assert front.last_rows(step) == (complete.index(False) if False in complete else height)
    assert len(when) == height * width
    for (row, column), (step, turn) in when.items():
        assert column == 0 or when[row, column - 1] < (step, turn)
        for above in range(1, row + 1):
            for read in range(min(width, column + front.skew * above)):
                assert when[row - above, read][0] < step


# The skew.


@pytest.mark.parametrize("kernel", range(2, 8))
@pytest.mark.parametrize("form", ["rows", "symmetric"])
@pytest.mark.parametrize("mask", ["strict", "inclusive"])
@every_given
def test_skew_of_pixelsnail(told: str, mask: str, form: str, kernel: int) -> None:
    prior = without_attention(told, shape=(6, 9), mask=mask, form=form, kernel_size=kernel)
    plan = compile_plan(prior)
    assert plan.skew == kernel // 2 + 1
    assert plan.raster_reason is None
    assert plan.front(2) == Front((6, 9), kernel // 2 + 1, 2)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (9, 2), (9, 3)])
def test_small_grids_are_sampled_in_raster_order(shape: tuple[int, int]) -> None:
    plan = compile_plan(without_attention(shape=shape, kernel_size=5))
    assert plan.skew is None
    assert plan.raster_reason == "nothing is to be gained on a grid this small"
    front = plan.front(shape[1])
    assert front.dependent_steps == shape[0] * shape[1]


RASTER: dict[str, tuple[Callable[[], Prior], str]] = {
    "attention": (snail, "its attention reads all positions before"),
    "pixelcnn": (pixelcnn, "it reads features to the right in a position's own row"),
}


@pytest.mark.parametrize(("make", "reason"), RASTER.values(), ids=RASTER)
def test_raster_order_has_a_reason(make: Callable[[], Prior], reason: str) -> None:
    prior = make()
    plan = compile_plan(prior)
    assert (plan.skew, plan.raster_reason) == (None, reason)
    message = f"tile: expected 4, the width of the grid, got 2: {reason}"
    narrow, raster = EngineOptions(tile=2), EngineOptions(tile=4)
    with refuses(ArgumentError, message):
        sample(prior, 1, engine="torch", options=narrow)
    with refuses(ArgumentError, message):
        fastvq.explain(prior, engine="torch", options=narrow)
    rows: list[int] = []
    with refuses(ArgumentError, message):
        fill("torch", prior, request_of(prior, 1, {}, seed=0), lambda count, _: rows.append(count), narrow)
    assert rows == []
    wanted = sample(prior, 2, seed=1, engine="torch")
    assert torch.equal(sample(prior, 2, seed=1, engine="torch", options=raster), wanted)


def test_a_tile_wider_than_the_grid() -> None:
    prior = without_attention(shape=(4, 6))
    for call in (sample, fastvq.explain):
        arguments: dict[str, Any] = {"engine": "torch", "options": EngineOptions(tile=7)}
        with refuses(ArgumentError, "tile: expected 1 to the width of the grid, 6, got 7"):
            call(prior, 1, **arguments) if call is sample else call(prior, **arguments)


@torch.no_grad()
def dependencies(prior: Prior) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of a position and one whose code its logits change with, in float64, over a few random grids."""
    prior, (height, width) = prior.double(), prior.config.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    found = set()
    for seed in range(3):
        one, told = grids(prior, 1, seed)
        codes = one.repeat(len(places), 1, 1)
        changed = codes.clone()
        for index, (row, column) in enumerate(places):
            changed[index, row, column] = (one[0, row, column] + 1 + seed) % prior.config.num_codes
        everywhere = {
            name: [level.repeat(len(places), 1, 1) for level in value]
            if name == "condition"
            else value.repeat(len(places))
            for name, value in told.items()
        }
        # Libraries may round another sample of a batch differently, so each is compared with its own place.
        differs = (prior(changed, **everywhere) != prior(codes, **everywhere)).any(1)  # [changed position, H, W]
        found |= {((row, column), places[index]) for index, row, column in differs.nonzero().tolist()}
    return found


@every_architecture
@pytest.mark.parametrize("told", ["alone", "both"])
def test_the_skew_is_what_the_model_needs_and_no_more(kind: str, told: str) -> None:
    prior = spread(without_attention(told, **ARCHITECTURES[kind]))
    skew, pairs = skew_of(prior), dependencies(prior)

    def violate(skew: int) -> list[object]:
        return [(at, read) for at, read in pairs if read[1] + skew * read[0] >= at[1] + skew * at[0]]

    assert len(pairs) > 100
    assert violate(skew) == []
    assert violate(skew - 1) != []


# The engine.


@functools.cache
def reference(kind: str, told: str) -> tuple[Prior, dict[str, Any], torch.Tensor]:
    prior = spread(without_attention(told, **ARCHITECTURES[kind]))
    told_too = given_to(prior, 6)
    return prior, told_too, sample(prior, 6, seed=4, engine="naive", micro_batch=6, **told_too)


@every_architecture
@every_given
def test_codes_do_not_depend_on_the_tile(kind: str, told: str) -> None:
    prior, told_too, naive = reference(kind, told)
    noise = uniforms(4, 0, 6, prior.config.shape)
    options = [None, *(EngineOptions(tile=tile + 1) for tile in range(prior.config.shape[1]))]
    for chosen in options:
        found = sample(prior, 6, seed=4, engine="torch", micro_batch=6, options=chosen, **told_too)
        assert require_same_codes(prior, found, naive, noise, told_too) > 0.8


@settings(drawn, max_examples=40)
@given(
    config=pixelsnails(), shape=st.sampled_from(((5, 4), (9, 5), (4, 8))), data=st.data(), seed=st.integers(0, 2**31)
)
def test_logits_of_any_architecture(
    config: PixelSNAILConfig, shape: tuple[int, int], data: st.DataObject, seed: int
) -> None:
    levels = ((1, 1), (shape[0], 1))[: len(config.condition_shapes)]
    prior = prior_of(dataclasses.replace(config, shape=shape, attention=False, condition_shapes=levels), seed)
    skewed = compile_plan(prior).skew is not None
    tile = data.draw(st.integers(1, shape[1])) if skewed else shape[1]
    codes, told = grids(prior, 2, seed)
    require_logits("torch", prior, codes, told, tile=tile)


@pytest.mark.parametrize("tile", [1, 2, 3, 6])
@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_k": 3, "top_p": 0.9}], ids=["temperature", "top"])
def test_known_codes_and_settings(settings: dict[str, Any], tile: int) -> None:
    prior = spread(without_attention("labels", **ARCHITECTURES["inclusive"]))
    told = given_to(prior, 5)
    noise = uniforms(3, 0, 5, prior.config.shape)
    init = random_codes(5, *prior.config.shape, seed=9)
    known = torch.rand(init.shape) < 0.4
    request = request_of(prior, 5, told, noise=noise, init_codes=init, mask=known, settings=Settings(**settings))
    naive = fill("naive", prior, request, lambda *_: None)
    found = fill("torch", prior, request, lambda *_: None, EngineOptions(tile=tile))
    assert torch.equal(found[known], init[known])
    require_same_codes(prior, found, naive, noise, told, known=known, **settings)


@torch.inference_mode()
def drawn_logits(prior: Prior, plan: Plan, tile: int) -> torch.Tensor:
    """Logits that codes of 3 samples are drawn from, [3, H, W, K]."""
    request = request_of(prior, 3, {}, seed=0)
    logits = torch.full((*request.noise.shape, plan.num_codes), float("nan"))
    grid = TorchGrid(TorchPlan(plan, logits.device), plan.front(tile), 3, static_inputs(prior, request))
    sample_torch(grid, request, lambda *_: None, logits=logits)
    return logits


@every_architecture
def test_a_front_that_does_not_wait_is_noticed(kind: str) -> None:
    prior = spread(without_attention(**ARCHITECTURES[kind]))
    plan, width = compile_plan(prior), prior.config.shape[1]
    early = dataclasses.replace(plan, skew=skew_of(prior) - 1)
    wanted = drawn_logits(prior, plan, width)
    torch.testing.assert_close(drawn_logits(prior, plan, 1), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn_logits(prior, early, width), wanted, rtol=0, atol=1e-4)
    assert float((drawn_logits(prior, early, 1) - wanted).abs().max()) > 0.1


@pytest.mark.parametrize("tile", [None, 1, 4, 6])
def test_rows_and_phases_are_told_step_by_step(tile: int | None) -> None:
    prior = without_attention(**ARCHITECTURES["inclusive"])
    front = front_of(compile_plan(prior), tile)
    assert front.tile == (1 if tile is None else tile)
    rows: list[int] = []
    phases: list[str] = []
    request = request_of(prior, 2, {}, seed=0)
    fill(
        "torch",
        prior,
        request,
        lambda count, _: rows.append(count),
        EngineOptions(tile=tile),
        on_phase=lambda name, _: phases.append(name),
    )
    assert sum(rows) == prior.config.shape[0]
    assert min(rows) >= 1
    assert phases == ["row phase", "step phase"] * front.steps
