"""How wide the tiles of a front should be on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

from fastvq.sampling.plan.form import Plan
from fastvq.sampling.plan.front import Front

# What a core of a few years ago does in a second. Only ratios of these numbers matter, and those little: widths beside
# the best one cost a few per cent.
_FLOPS = 3.5e10
_NEAR_BYTES, _FAR_BYTES = 3e10, 8e9  # weights read from a core's own caches, and from beyond
_NEAR = 1 << 19  # bytes of weights that stay in a core's own caches
_MEETING = 5e-7  # seconds that threads take to meet
_TILE_ROWS = 6  # rows of a register tile; fewer leave multipliers idle

# Of the time in raster order; a smaller gain may well be none.
_LEAST_GAIN = 0.97
# Rows in flight cost memory.
_MOST_MEMORY = 1.5


def best_front(plan: Plan, batch: int, threads: int, element: int, memory: Callable[[Front], int]) -> tuple[Front, str]:
    """The front along which a micro-batch should be filled fastest, and why.

    Args:
        element: bytes of a weight.
        memory: bytes that a front keeps per sample.
    """
    width = plan.shape[1]
    order = plan.front(width)
    if plan.skew is None:
        return order, f"raster order: {plan.raster_reason}"
    sizes = [2**power for power in range(width.bit_length()) if 2**power < width]
    most = _MOST_MEMORY * memory(order)
    fronts = [order, *(front for front in map(plan.front, sizes) if memory(front) <= most)]
    times = {front.tile: seconds(plan, front, batch, threads, element) for front in fronts}
    best = min(fronts, key=lambda front: times[front.tile])
    if times[best.tile] > _LEAST_GAIN * times[width]:
        return order, "raster order: its products are wide enough, and read their weights least often"
    return best, "weights are shared by the rows in flight"


def seconds(plan: Plan, front: Front, batch: int, threads: int, element: int) -> float:
    """About how long filling the grids of a micro-batch takes: arithmetic, reading weights, and threads that meet."""
    above = sum(term.weight.numel() for terms in plan.row_terms.values() for term in terms)
    steps = sum(term.weight.numel() for terms in plan.step_terms.values() for term in terms)
    positions = math.prod(front.shape)
    before = _product_seconds(above, batch * positions / front.steps, threads, element) * front.steps
    during = _product_seconds(steps, batch * positions / front.dependent_steps, threads, element)
    return before + (during + plan.num_levels * _MEETING * (threads > 1)) * front.dependent_steps


def _product_seconds(weights: int, rows: float, threads: int, element: int) -> float:
    """Of products with that many weights, each multiplied once for every row."""
    full = max(rows, 1.0) / (_TILE_ROWS * math.ceil(max(rows, 1.0) / _TILE_ROWS))
    arithmetic = 2 * weights * rows / (_FLOPS * threads * max(full, 0.3))
    share = weights * element / threads
    reading = share / (_NEAR_BYTES if share <= _NEAR else _FAR_BYTES)
    # Processors do both at a time, as far as they can.
    return max(arithmetic, reading) + 0.5 * min(arithmetic, reading)
