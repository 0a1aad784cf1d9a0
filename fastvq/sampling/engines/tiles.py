"""How wide the tiles of a front should be on a CPU."""

from __future__ import annotations

import math

from fastvq.sampling.plan.form import Plan
from fastvq.sampling.plan.front import Front


def best_front(plan: Plan, batch: int, threads: int, element: int) -> tuple[Front, str]:
    """The front along which a micro-batch should be filled fastest, and why."""
    width = plan.shape[1]
    if plan.skew is None:
        return plan.front(width), f"raster order: {plan.raster_reason}"
    return plan.front(1), "x"


def mean_tiles(front: Front) -> float:
    """Tiles of a step on average."""
    return front.tiles * front.shape[0] / front.steps


def positions_at_once(front: Front) -> float:
    """Positions of one sample that are worked on together, on average."""
    return math.prod(front.shape) / front.dependent_steps
