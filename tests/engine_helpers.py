"""Random priors whose logits spread over several units, the logits engines compute, and what counts as equal."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, TypeVar

import pytest
import torch
from helpers import random_codes
from torch import Tensor, nn

from fastvq import _engine
from fastvq.errors import ArgumentError
from fastvq.models import Prior
from fastvq.ops.draw import draw_margin
from fastvq.sampling.engines import cpu, static_inputs
from fastvq.sampling.engines.cpu import CpuPlan
from fastvq.sampling.engines.pytorch import TorchGrid, TorchPlan, front_of, sample_torch
from fastvq.sampling.plan import Plan, Term, compile_plan
from fastvq.sampling.request import SampleRequest, Settings, build_request

# How near to a boundary between two codes, in probability, rounding may decide.
EPS = 1e-5
P = TypeVar("P", bound=Prior)
CACHED = ("torch", "cpu")

needs_extension = pytest.mark.skipif(not _engine.available(), reason="the compiled extension is not built")


def require_kernels(name: str) -> None:
    """Skips where the processor has no such kernels."""
    try:
        cpu.require_kernels(name)
    except ArgumentError as error:
        pytest.skip(str(error))


@torch.no_grad()
def spread(prior: P, seed: int = 0, units: float = 3.0) -> P:
    """Weights at which every layer matters, and logits with a standard deviation of some units."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in prior.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.3 * values)
        elif parameter.ndim == 4:
            parameter.copy_(values / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(values / math.sqrt(max(1, parameter.shape[0]) if parameter.ndim == 3 else 1))
    output = prior.get_submodule("output")
    codes, given = grids(prior, 4, seed)
    assert isinstance(output, nn.Conv2d)
    assert output.bias is not None
    # What differs between positions is to spread, not only what differs between codes.
    raw = prior.eval()(codes, **given) - output.bias[:, None, None]
    mean = raw.mean((0, 2, 3))
    scale = units / max(float((raw - mean[:, None, None]).std()), 0.1 * float(raw.std()), 1e-3)
    output.weight.mul_(scale)
    output.bias.add_(mean, alpha=-scale)
    return prior


def given_to(prior: Prior, n: int, seed: int = 0) -> dict[str, Any]:
    """Random condition and labels for n samples, as the prior needs them."""
    config = prior.config
    given: dict[str, Any] = {}
    if config.condition_shapes:
        given["condition"] = [
            random_codes(n, *shape, num_codes=count, seed=seed + level + 1)
            for level, (shape, count) in enumerate(
                zip(config.condition_shapes, config.condition_num_codes, strict=True)
            )
        ]
    if config.num_classes is not None:
        given["label"] = torch.arange(n) % config.num_classes
    return given


def part(given: dict[str, Any], start: int, n: int) -> dict[str, Any]:
    """What `given_to` gives, for n samples from one on."""
    cut = slice(start, start + n)
    return {name: [codes[cut] for codes in what] if name == "condition" else what[cut] for name, what in given.items()}


def grids(prior: Prior, n: int, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """Random codes for n samples, and what else the prior is given."""
    return random_codes(n, *prior.config.shape, num_codes=prior.config.num_codes, seed=seed), given_to(prior, n, seed)


def request_of(prior: Prior, n: int, given: dict[str, Any], **changes: Any) -> SampleRequest:
    fields: dict[str, Any] = {"condition": None, "label": None, "noise": None, "seed": None, "start": 0}
    fields |= {"init_codes": None, "mask": None, "settings": Settings()}
    return build_request(prior, n, **{**fields, **given, **changes})


@torch.inference_mode()
def engine_logits(
    engine: str, prior: Prior, codes: Tensor, given: dict[str, Any], *, plan: Plan | None = None, **options: Any
) -> Tensor:
    """Logits [B, H, W, K] that an engine computes at every position of grids that are known beforehand."""
    batch = len(codes)
    everything = torch.ones_like(codes, dtype=torch.bool)
    request = request_of(prior, batch, given, seed=0, init_codes=codes, mask=everything)
    plan, statics = plan or compile_plan(prior), static_inputs(prior, request)
    logits = torch.full((*codes.shape, prior.config.num_codes), float("nan"))
    if engine == "cpu":
        settings = {"kernels": options.pop("kernels", "auto"), "bf16": options.pop("bf16", False)}
        front = plan.front(options.pop("tile", None) or (1 if plan.skew else plan.shape[1]))
        filled = CpuPlan(plan, **settings).fill(
            request, statics, front, lambda *_: None, **{"threads": 1, **options}, logits=logits
        )
    else:
        grid = TorchGrid(TorchPlan(plan, codes.device), front_of(plan, options.get("tile")), batch, statics)
        filled = sample_torch(grid, request, lambda *_: None, logits=logits)
    assert torch.equal(filled, codes)
    return logits


def rounded(plan: Plan, *, above: bool = True) -> Plan:
    """With weights of products in bfloat16; without those on rows above and of what is known beforehand if not so."""

    def of(terms: dict[int, tuple[Term, ...]]) -> dict[int, tuple[Term, ...]]:
        return {
            index: tuple(dataclasses.replace(term, weight=term.weight.bfloat16().float()) for term in found)
            for index, found in terms.items()
        }

    steps = of(plan.step_terms)
    return dataclasses.replace(plan, step_terms=steps, row_terms=of(plan.row_terms) if above else plan.row_terms)


@torch.no_grad()
def model_logits(prior: Prior, codes: Tensor, given: dict[str, Any]) -> Tensor:
    """[B, H, W, K], from one pass of the model."""
    return prior(codes, **given).movedim(1, -1)


@torch.no_grad()
def own_error(
    prior: Prior, codes: Tensor, given: dict[str, Any], exact: Tensor, move: float = torch.finfo(torch.float32).eps
) -> float:
    """How far the model itself is off in float32: the most of 4 times, as once may be by luck.

    After the first time every weight moves by up to a share of itself: a unit in the last place unless told otherwise.
    """
    other, worst = copy.deepcopy(prior), 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        worst = max(worst, float((model_logits(other, codes, given) - exact).abs().max()))
        for moved, weight in zip(other.parameters(), prior.parameters(), strict=True):
            noise = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
            moved.copy_(weight.double() * (1 + noise * move))
    return worst


def require_logits(engine: str, prior: Prior, codes: Tensor, given: dict[str, Any], **options: Any) -> float:
    """An engine's logits are as near to those in float64 as the model's own: at most 4 times as far off.

    At least 8 units in the last place of the largest logit are granted. Returns the error in units of the bound.
    """
    exact = model_logits(copy.deepcopy(prior).double(), codes, given)
    own = own_error(prior, codes, given, exact)
    found = engine_logits(engine, prior, codes, given, **options)
    assert found.isfinite().all()
    bound = 4 * max(own, 8 * torch.finfo(torch.float32).eps * float(exact.abs().max()))
    error = (found - exact).abs()
    worst = float(error.max())
    place = torch.unravel_index(error.argmax(), error.shape)
    assert worst <= bound, f"{worst:.3g} > {bound:.3g} at {[int(i) for i in place]} (model: {own:.3g})"
    return worst / bound


def require_same_codes(
    prior: Prior,
    found: Tensor,
    wanted: Tensor,
    noise: Tensor,
    given: dict[str, Any],
    *,
    known: Tensor | None = None,
    **settings: Any,
) -> float:
    """Codes are equal up to positions at which rounding may decide. Returns the share of identical grids.

    Every code of ``found`` has to be right for the codes before it, up to EPS; and where a sample first differs, the
    code of ``wanted`` has to be right up to EPS as well. Later codes follow from other ones and need not be equal.
    """
    free = torch.ones_like(found, dtype=torch.bool) if known is None else ~known
    logits = model_logits(prior, found, given)
    margin = draw_margin(logits, noise, found, **settings)
    assert (margin[free] >= -EPS).all()
    assert torch.equal(found[~free], wanted[~free])
    differs = (found != wanted).flatten(1)
    other = draw_margin(logits, noise, wanted, **settings).flatten(1)
    for sample in differs.any(1).nonzero().flatten().tolist():
        first = int(differs[sample].nonzero()[0])
        assert other[sample, first] >= -EPS, f"sample {sample}, position {first}: margin {other[sample, first]}"
    return 1 - float(differs.any(1).float().mean())
