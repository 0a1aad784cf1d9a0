"""What sampling a prior costs, read off its plan before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastvq._check import require_positive_int
from fastvq.models.prior import Prior
from fastvq.sampling.engines import Engine, choose, engine_named, plan_of, why_no_values
from fastvq.sampling.engines.base import Schedule
from fastvq.sampling.micro_batch import choose_micro_batch
from fastvq.sampling.options import EngineOptions, Precision, engine_options
from fastvq.sampling.plan import Op, Plan, Term, compile_plan
from fastvq.sampling.request import as_prior

_FLOAT = 4


@dataclass(frozen=True)
class Explanation:
    """Arithmetic and memory of sampling one prior. FLOPs count a multiplication and an addition as two.

    Attributes:
        name, shape: class of the prior, and its grid (H, W).
        engine, reason: what :func:`fastvq.sample` would take, and why; ``none`` for weights on the meta device, which
            can be described and not sampled.
        levels: groups of operations per position that wait for each other, the draw included.
        row_ops, left_ops, here_ops: number of operations by what they wait for.
        row_flops, step_flops: per sample, of what is known before the steps of a row or tile, and of the steps.
        naive_flops: per sample, of the naive sampler on the same prior.
        row_weight_bytes, step_weight_bytes: float32 weights read per row or tile step, and per position.
        skew, raster_reason: positions of equal column + skew * row can be sampled together; or None, and why only
            raster order samples this prior.
        micro_batch: samples computed together, of those that were asked about.
        schedule: of such a micro-batch: its front with the width of tiles, why that width, and what it keeps in memory.
    """

    name: str
    shape: tuple[int, int]
    engine: str
    reason: str
    levels: int
    row_ops: int
    left_ops: int
    here_ops: int
    row_flops: int
    step_flops: int
    naive_flops: int
    row_weight_bytes: int
    step_weight_bytes: int
    skew: int | None
    raster_reason: str | None
    micro_batch: int
    schedule: Schedule
    _schedule_of: Callable[[int], Schedule] = field(repr=False, compare=False)

    @property
    def saved(self) -> float:
        """How many times less arithmetic than the naive sampler."""
        return self.naive_flops / (self.row_flops + self.step_flops)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the plan and its packed copies, shared by all samples."""
        return self.schedule.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes that the micro-batch keeps while grids are filled."""
        return self.schedule.cache_bytes

    @property
    def samples_per_step(self) -> float:
        """Positions that are sampled together on average, of all samples of the micro-batch."""
        return self.micro_batch * math.prod(self.shape) / self.schedule.front.dependent_steps

    def memory(self, batch: int) -> int:
        """Bytes that sampling a micro-batch of ``batch`` samples takes beyond the prior itself."""
        return self._schedule_of(batch).memory

    def __str__(self) -> str:
        front, batch = self.schedule.front, self.micro_batch
        above = f"{_si(batch * self.row_flops / front.steps)}FLOP, {_si(self.row_weight_bytes)}B of weights"
        steps = f"{_si(batch * self.step_flops / front.dependent_steps)}FLOP, {_si(self.step_weight_bytes)}B of weights"
        skew = f"raster order only: {self.raster_reason}" if self.skew is None else f"skew {self.skew}"
        lines = [
            f"{self.name} over {self.shape[0]} x {self.shape[1]} positions",
            f"  engine       {self.engine} ({self.reason})",
            f"  operations   {self.row_ops} by row, {self.left_ops} from the left, {self.here_ops} here; "
            f"{self.levels} levels per position",
            f"  order        {skew}",
            f"  memory       {_si(self.weight_bytes)}B of weights, {_si(self.cache_bytes)}B for {batch} at a time",
            f"  tiles        {front.tile} wide ({self.schedule.reason}): {front.steps} tile steps, "
            f"{front.dependent_steps} dependent steps of {self.samples_per_step:.3g} positions",
            f"  tile step    {above}",
            f"  step         {steps}",
            f"  per sample   {_si(self.row_flops + self.step_flops)}FLOP, naive {_si(self.naive_flops)}FLOP: "
            f"{self.saved:.0f} times less",
        ]
        return "\n".join(lines)


def describe(
    prior: Prior | nn.Module,
    n: int = 1,
    *,
    engine: str = "auto",
    micro_batch: int | None = None,
    memory_limit: int | None = None,
    precision: Precision = "float32",
    options: EngineOptions | None = None,
    shape: tuple[int, int] | None = None,
    num_codes: int | None = None,
    num_classes: int | None = None,
) -> Explanation:
    """Arithmetic and memory of sampling a prior; arguments are those of :func:`fastvq.sample`.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that :func:`fastvq.sample` refuses.
        UnavailableError: there is no plan of this prior, or the engine asked for cannot run it here.
    """
    prior = as_prior(prior, shape=shape, num_codes=num_codes, num_classes=num_classes)
    options = engine_options(precision, options)
    n = require_positive_int("n", n)
    reason = why_no_values(prior)
    chosen: Engine[Any]
    if reason is None:
        plan = plan_of(prior)
        chosen, reason = choose(engine, prior, options)
        name = chosen.name
    else:
        # Without values there is nothing to sample, and nothing to keep for later calls.
        plan, chosen, name = compile_plan(prior), engine_named("cpu"), "none"
    size = min(n, choose_micro_batch(plan, chosen, options, n, micro_batch, memory_limit))

    def schedule_of(batch: int) -> Schedule:
        # The naive engine keeps nothing; a plan says what the cached ones would.
        return (chosen if chosen.plans else engine_named("torch")).schedule(plan, batch, options)

    height, width = plan.shape
    row_weights = {op.index: _size(plan.row_terms[op.index]) for op in plan.ops if op.kind == "affine"}
    step_weights = {op.index: _size(plan.step_terms[op.index]) for op in plan.ops if op.kind == "affine"}
    per_row = sum(
        2 * term.weight.numel() * _times(term, plan) for op in plan.ops for term in plan.row_terms.get(op.index, ())
    ) + _lookup_flops(plan, above=True)
    per_step = 2 * sum(step_weights.values()) * width * height + _lookup_flops(plan, above=False)
    attention = sum(_attention_flops(op, plan) for op in plan.ops if op.kind == "attention")
    full = sum(row_weights[i] + step_weights[i] for i in row_weights if i not in plan.uniform)
    # Row r of the naive sampler runs the network on r + 1 rows once for each of its columns.
    rows_run = width * height * (height + 1) // 2
    naive = 2 * full * rows_run * width + sum(_naive_attention(op, plan) for op in plan.ops if op.kind == "attention")
    timing = [plan.timing[op.index] for op in plan.ops if op.kind != "static"]
    return Explanation(
        name=type(prior).__name__,
        shape=plan.shape,
        engine=name,
        reason=reason,
        levels=plan.num_levels,
        row_ops=timing.count("row"),
        left_ops=timing.count("left"),
        here_ops=timing.count("here"),
        row_flops=per_row,
        step_flops=per_step + attention,
        naive_flops=naive,
        row_weight_bytes=_FLOAT * sum(row_weights.values()),
        step_weight_bytes=_FLOAT * sum(step_weights.values()),
        skew=plan.skew,
        raster_reason=plan.raster_reason,
        micro_batch=size,
        schedule=schedule_of(size),
        _schedule_of=schedule_of,
    )


def explain(
    prior: Prior | nn.Module,
    n: int = 1,
    *,
    engine: str = "auto",
    micro_batch: int | None = None,
    memory_limit: int | None = None,
    precision: Precision = "float32",
    options: EngineOptions | None = None,
    shape: tuple[int, int] | None = None,
    num_codes: int | None = None,
    num_classes: int | None = None,
) -> None:
    """Print how a prior is sampled and what that costs: engine, order, tiles, FLOPs, weights, memory, what is saved.

    Arguments are those of :func:`fastvq.sample`. What is printed is what :func:`fastvq.sampling.describe` returns.

    Raises:
        ArgumentError, ArgumentTypeError, UnavailableError: as of :func:`fastvq.sampling.describe`.
    """
    limits: dict[str, Any] = {"micro_batch": micro_batch, "memory_limit": memory_limit}
    limits |= {"shape": shape, "num_codes": num_codes, "num_classes": num_classes}
    print(describe(prior, n, engine=engine, **limits, precision=precision, options=options))


def _size(terms: tuple[Term, ...]) -> int:
    return sum(term.weight.numel() for term in terms)


def _times(term: Term, plan: Plan) -> int:
    """How often the weights of a term that is known before the steps multiply a vector of one sample."""
    return 1 if term.source in plan.uniform else math.prod(plan.shape)


def _lookup_flops(plan: Plan, *, above: bool) -> int:
    taps = sum(op.channels for op in plan.ops for dr, _ in op.taps if (dr < 0) == above)
    return taps * math.prod(plan.shape)


def _attention_flops(op: Op, plan: Plan) -> int:
    """Products of queries with earlier keys, and of weights with values, over a whole grid."""
    positions = math.prod(plan.shape)
    pairs = positions * (positions + (1 if op.variant == "inclusive" else -1)) // 2
    return 2 * pairs * (plan.ops[op.sources[1]].channels + op.channels)


def _naive_attention(op: Op, plan: Plan) -> int:
    height, width = plan.shape
    widths = plan.ops[op.sources[1]].channels + op.channels
    return sum(width * 2 * ((row + 1) * width) ** 2 * widths for row in range(height))


def _si(value: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"
