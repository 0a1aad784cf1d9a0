"""What sampling a prior costs, read off its plan before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fastvq.models.prior import Prior
from fastvq.sampling.engines import choose, plan_of, why_no_values
from fastvq.sampling.engines.state import padded, ring_rows
from fastvq.sampling.options import EngineOptions, Precision, engine_options
from fastvq.sampling.plan import Op, Plan, Term, compile_plan
from fastvq.sampling.request import as_prior

_FLOAT = 4


@dataclass(frozen=True)
class Explanation:
    """Arithmetic and memory of sampling one prior. FLOPs count a multiplication and an addition as two.

    Attributes:
        engine, reason: what :func:`fastvq.sample` would take, and why; ``none`` for weights on the meta device, which
            can be described and not sampled.
        levels: groups of operations per position that wait for each other, the draw included.
        row_ops, left_ops, here_ops: number of operations by what they wait for.
        row_flops, step_flops, setup_flops: per sample, of the row phase, of the step phase, and once beforehand.
        naive_flops: per sample, of the naive sampler on the same prior.
        row_weight_bytes, step_weight_bytes: float32 weights read per row, and per position.
        cache_bytes: per sample of a micro-batch: what is kept while a grid is filled.
        weight_bytes: of the plan and its packed copies, shared by all samples.
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
    cache_bytes: int
    weight_bytes: int

    @property
    def saved(self) -> float:
        """How many times less arithmetic than the naive sampler."""
        return self.naive_flops / (self.row_flops + self.step_flops)

    def memory(self, batch: int) -> int:
        """Bytes that sampling a micro-batch takes beyond the prior itself."""
        return self.weight_bytes + batch * self.cache_bytes

    def __str__(self) -> str:
        height, width = self.shape
        positions = height * width
        lines = [
            f"{self.name} over {height} x {width} positions",
            f"  engine       {self.engine} ({self.reason})",
            f"  operations   {self.row_ops} by row, {self.left_ops} from the left, {self.here_ops} here; "
            f"{self.levels} levels per position",
            f"  row phase    {_si(self.row_flops / height)}FLOP per row and sample, "
            f"{_si(self.row_weight_bytes)}B of weights per row",
            f"  step phase   {_si(self.step_flops / positions)}FLOP per position and sample, "
            f"{_si(self.step_weight_bytes)}B of weights per position",
            f"  memory       {_si(self.weight_bytes)}B of weights, {_si(self.cache_bytes)}B per sample",
            f"  per sample   {_si(self.row_flops + self.step_flops)}FLOP, naive {_si(self.naive_flops)}FLOP: "
            f"{self.saved:.0f} times less",
        ]
        return "\n".join(lines)


def describe(
    prior: Prior | nn.Module,
    *,
    engine: str = "auto",
    precision: Precision = "float32",
    options: EngineOptions | None = None,
) -> Explanation:
    """Arithmetic and memory of sampling a prior; arguments are those of :func:`fastvq.sample`.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that :func:`fastvq.sample` refuses.
        UnavailableError: there is no plan of this prior, or the engine asked for cannot run it here.
    """
    prior = as_prior(prior)
    options = engine_options(precision, options)
    reason = why_no_values(prior)
    if reason is None:
        plan = plan_of(prior)
        chosen, reason = choose(engine, prior, options)
        name, places = chosen.name, chosen.places
    else:
        # Without values there is nothing to sample, and nothing to keep for later calls.
        plan, name, places = compile_plan(prior), "none", 1
    height, width = plan.shape
    row_weights = {op.index: _size(plan.row_terms[op.index]) for op in plan.ops if op.kind == "affine"}
    step_weights = {op.index: _size(plan.step_terms[op.index]) for op in plan.ops if op.kind == "affine"}
    per_row = sum(
        2 * term.weight.numel() * _times(op, term, plan) for op in plan.ops for term in plan.row_terms.get(op.index, ())
    ) + _lookup_flops(plan, above=True)
    per_step = 2 * sum(step_weights.values()) * width * height + _lookup_flops(plan, above=False)
    attention = sum(_attention_flops(op, plan) for op in plan.ops if op.kind == "attention")
    full = sum(row_weights[i] + step_weights[i] for i in row_weights if i not in plan.uniform)
    # Row r of the naive sampler runs the network on r + 1 rows once for each of its columns.
    rows_run = width * height * (height + 1) // 2
    naive = 2 * full * rows_run * width + sum(_naive_attention(op, plan) for op in plan.ops if op.kind == "attention")
    timing = [plan.timing[op.index] for op in plan.ops if op.kind != "static"]
    packed = sum(row_weights.values()) + sum(step_weights.values())
    tables = sum(op.weight.numel() for op in plan.ops if op.weight is not None)
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
        cache_bytes=cache_bytes(plan, places=places),
        weight_bytes=_FLOAT * 2 * (packed + tables),
    )


def explain(
    prior: Prior | nn.Module,
    *,
    engine: str = "auto",
    precision: Precision = "float32",
    options: EngineOptions | None = None,
) -> None:
    """Print what sampling a prior costs: engine, levels per position, FLOPs, weights, memory, the arithmetic saved.

    Arguments are those of :func:`fastvq.sample`, and what it would refuse is refused here.
    """
    print(describe(prior, engine=engine, precision=precision, options=options))


def cache_bytes(plan: Plan, places: int = 1) -> int:
    """Bytes per sample that a micro-batch keeps while its grids are filled, with ``places`` for a passing vector."""
    height, width = plan.shape
    floats = 0
    kept = {*plan.history, *(op.sources[2] for op in plan.ops if op.kind == "attention")}
    for index, history in plan.history.items():
        floats += ring_rows(history) * (width + history.left + history.right) * plan.ops[index].channels
    for op in plan.ops:
        if op.kind == "attention":
            _, key, value = op.sources
            floats += padded(height * width) * plan.ops[key].channels + height * width * plan.ops[value].channels
        if op.kind == "static":
            floats += op.channels * {"context": height * width, "label": 1}.get(op.variant, 0)
        elif plan.level[op.index] < 0 or plan.row_terms.get(op.index) or any(dr < 0 for dr, _ in op.taps):
            floats += op.channels * (width if _varies(op, plan) else 1)
        if plan.level[op.index] >= 0 and op.index not in kept:
            floats += places * op.channels
    return _FLOAT * floats + torch.int64.itemsize * height * width


def _varies(op: Op, plan: Plan) -> bool:
    """Whether what the row phase works out for an operation differs from column to column."""
    if op.kind == "affine":
        return any(term.source not in plan.uniform for term in plan.row_terms[op.index])
    return op.index not in plan.uniform


def _size(terms: tuple[Term, ...]) -> int:
    return sum(term.weight.numel() for term in terms)


def _times(op: Op, term: Term, plan: Plan) -> int:
    """How often a grid's row phase multiplies one vector by the weights of a term."""
    height, width = plan.shape
    if op.index in plan.uniform:
        return 1
    return height if term.source in plan.uniform else height * width


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
