"""What `describe` counts of a plan, against counts made from the layers of the model, and `explain`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from engine_helpers import given_to, grids, needs_extension, request_of
from plan_priors import GIVEN, PRIORS, every_given, every_prior
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastvq
from fastvq.models import GatedPixelCNN, Prior
from fastvq.models.blocks import CausalConv2d, CodeConv2d
from fastvq.models.pixelcnn import GatedLayer
from fastvq.sampling import EngineOptions, describe
from fastvq.sampling.engines import plan_of, static_inputs
from fastvq.sampling.engines.cpu import CpuPlan
from fastvq.sampling.plan import Term

pytestmark = pytest.mark.usefixtures("steady")


def valid_taps(layer: nn.Module) -> int:
    """Taps that a convolution really reads."""
    if not isinstance(layer, CausalConv2d):
        assert isinstance(layer, nn.Conv2d)
        return math.prod(layer.kernel_size)
    k = layer.weight.shape[-1]
    above = k - 1 if layer.form == "rows" else k // 2
    return above * k + k // 2 + (layer.mask == "inclusive")


def layers_of(prior: Prior) -> tuple[int, int, int]:
    """Products per position, those of a label alone (once per grid), and additions of looked-up vectors."""
    products = by_label = lookups = 0
    spatial_context = bool(prior.config.condition_shapes)
    for name, layer in prior.named_modules():
        if name.startswith("context_encoder"):
            continue
        if isinstance(layer, CodeConv2d):
            lookups += len(layer.taps) * layer.weight.shape[2]
        elif isinstance(layer, (CausalConv2d, nn.Conv2d)):
            size = layer.weight.shape[0] * layer.weight.shape[1] * valid_taps(layer)
            if name.endswith("context") and not spatial_context:
                by_label += size
            else:
                products += size
    return products, by_label, lookups


def attention_of(prior: Prior) -> tuple[int, int]:
    """Number of attention blocks, and floats that a query meets per earlier position."""
    config: Any = prior.config
    if isinstance(prior, GatedPixelCNN) or not config.attention:
        return 0, 0
    return config.blocks, 2 * config.attention_width


@every_prior
@every_given
def test_flops(kind: str, told: str) -> None:
    prior = PRIORS[kind](**GIVEN[told])
    positions = math.prod(prior.config.shape)
    products, by_label, lookups = layers_of(prior)
    blocks, widths = attention_of(prior)
    inclusive = getattr(prior.config, "mask", "strict") == "inclusive"
    if isinstance(prior, GatedPixelCNN) and told != "alone":
        # Of each projection of the context, v and h take a half each; the last v is not needed.
        half = prior.config.condition_channels * 2 * prior.config.channels
        count = prior.config.layers + 1
        uniform, by_label = (by_label and half * (count - 1)), (by_label and half * count)
        products -= 0 if uniform or told == "labels" else half
    else:
        uniform = 0
    pairs = sum(position + inclusive for position in range(positions))
    want = 2 * products * positions + lookups * positions + 2 * by_label + 2 * uniform
    found = describe(prior)
    assert found.row_flops + found.step_flops == want + 2 * pairs * widths * blocks
    assert found.saved == found.naive_flops / (found.row_flops + found.step_flops)


@pytest.mark.parametrize("told", ["alone", "condition"])
@every_prior
def test_naive_flops(kind: str, told: str) -> None:
    prior = PRIORS[kind](**GIVEN[told])
    height, width = prior.config.shape
    products, _, _ = layers_of(prior)
    if isinstance(prior, GatedPixelCNN) and told == "condition":
        products -= prior.config.condition_channels * 2 * prior.config.channels
    blocks, widths = attention_of(prior)
    want = 0
    for row in range(height):
        positions = (row + 1) * width
        want += width * 2 * (products * positions + blocks * widths * positions**2)
    assert describe(prior).naive_flops == want


@pytest.mark.parametrize("kind", ["strict", "inclusive", "pixelcnn"])
def test_naive_flops_as_pytorch_counts_them(kind: str) -> None:
    """PyTorch leaves out the row above the grid, which some convolutions never read."""
    prior = PRIORS[kind](shape=(16, 4))
    counted = 0
    for row in range(16):
        codes, _ = grids(prior, 1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            prior.logits(codes[:, : row + 1], None)
        counted += 4 * counter.get_total_flops()
    assert 0.85 < counted / describe(prior).naive_flops < 1.01


@needs_extension
@every_prior
@every_given
@pytest.mark.parametrize("tile", [1, 2, None])
def test_memory_is_what_is_allocated(kind: str, told: str, tile: int | None) -> None:
    prior = PRIORS[kind](shape=(12, 8), **GIVEN[told])
    batch, plan = 16, plan_of(prior)
    if plan.skew is None:
        tile = None
    found = describe(prior, batch, engine="cpu", options=EngineOptions(tile=tile))
    front = found.schedule.front
    assert found.micro_batch == batch
    assert front.tile in (tile, plan.shape[1]) or tile is None
    allocated = CpuPlan(plan).memory(batch, front)
    statics = static_inputs(prior, request_of(prior, batch, given_to(prior, batch), seed=0))
    # The background belongs to the prior, and without gated layers nothing reads the condition.
    read = {op.variant for op in plan.ops if op.kind == "static"} - {"background"}
    allocated += sum(4 * tensor.numel() for name, tensor in statics.items() if name in read)
    assert found.cache_bytes == allocated + 8 * batch * math.prod(plan.shape)
    assert found.memory(batch) == found.weight_bytes + found.cache_bytes


@needs_extension
def test_weight_bytes_of_packed_plans() -> None:
    prior = PRIORS["strict"](channels=32, residual_channels=32)
    own = describe(prior, engine="torch").weight_bytes / 2
    for precision in ("float32", "bfloat16"):
        packed = CpuPlan(plan_of(prior), bf16=precision == "bfloat16").native.weight_bytes
        found = describe(prior, engine="cpu", precision=precision).weight_bytes  # type: ignore[arg-type]
        assert found == pytest.approx(own + packed, rel=0.1)


def test_weight_bytes_are_those_of_all_tensors() -> None:
    prior = PRIORS["strict"](channels=32, residual_channels=32)
    plan = plan_of(prior)
    found = describe(prior)

    def size(terms: Iterable[Term]) -> int:
        return sum(4 * term.weight.numel() for term in terms)

    assert found.row_weight_bytes == sum(map(size, plan.row_terms.values()))
    assert found.step_weight_bytes == sum(map(size, plan.step_terms.values()))
    model = sum(4 * p.numel() for p in prior.parameters())
    # The plan's own copy, and one made ready for each of the phases.
    assert model < found.weight_bytes < 3 * model
    assert found.memory(5) == found.weight_bytes + 5 * found.cache_bytes  # of one sample each


def test_explain_prints(capsys: pytest.CaptureFixture[str]) -> None:
    prior = PRIORS["strict"]()
    fastvq.explain(prior)
    out = capsys.readouterr().out
    found = describe(prior)
    assert out == f"{found}\n"
    assert out.startswith("PixelSNAIL over 3 x 4 positions\n")
    assert f"{found.levels} levels per position" in out
    assert found.engine in out
    assert f"{found.saved:.0f} times less" in out
    timing = [plan_of(prior).timing[op.index] for op in plan_of(prior).ops if op.kind != "static"]
    counts = (found.row_ops, found.left_ops, found.here_ops)
    assert counts == (timing.count("row"), timing.count("left"), timing.count("here"))


def test_layers_of_the_gated_pixelcnn_are_all_counted() -> None:
    prior: Any = PRIORS["pixelcnn"]()
    assert all(isinstance(layer, GatedLayer) for layer in prior.layers)
    assert layers_of(prior)[0] < sum(p.numel() for p in prior.parameters())
