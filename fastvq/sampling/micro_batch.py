"""How many samples are computed together."""

from __future__ import annotations

from typing import Any

from fastvq._check import require_positive_int
from fastvq.errors import ArgumentError
from fastvq.sampling.engines import Engine
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Plan

# Bytes that a micro-batch may take where the caller sets no limit, and samples that it may have in any case.
DEFAULT_MEMORY = 2 << 30
LEAST_MICRO_BATCH = 8


def choose_micro_batch(
    plan: Plan | None,
    engine: Engine[Any],
    options: EngineOptions,
    n: int,
    asked: int | None,
    memory_limit: int | None,
) -> int:
    """Samples to compute together: as asked for, or as many of n as are fastest within the memory limit.

    Args:
        plan: of the prior, where the engine runs plans.
        asked: what the caller wants.

    Raises:
        ArgumentError: the limit is below what is needed.
    """
    if asked is not None:
        require_positive_int("micro_batch", asked)
    if memory_limit is not None:
        require_positive_int("memory_limit", memory_limit)
        if not engine.plans:
            raise ArgumentError(
                f"memory_limit: the {engine.name} engine cannot keep to one; its memory is the model's own"
            )
    most = max(1, min(n, engine.micro_batch))
    if plan is None or not engine.plans:
        return most if asked is None else asked
    if engine.padded(plan, options):
        most = LEAST_MICRO_BATCH

    def memory(batch: int) -> int:
        return engine.schedule(plan, batch, options).memory

    if asked is None:
        limit = DEFAULT_MEMORY if memory_limit is None else memory_limit
        # Without a limit from the caller, as many as ever were computed together are not refused.
        least = 1 if memory_limit is not None else min(most, LEAST_MICRO_BATCH)
        size = next((size for size in range(most, least, -1) if memory(size) <= limit), least)
    else:
        size = asked
    if memory_limit is not None and memory(size) > memory_limit:
        raise ArgumentError(f"memory_limit: a micro-batch of {size} needs {memory(size)} bytes, got {memory_limit}")
    return size
