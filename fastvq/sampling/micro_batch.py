"""How many samples are computed together."""

from __future__ import annotations

from typing import Any

from fastvq._check import require_positive_int
from fastvq.errors import ArgumentError
from fastvq.sampling.engines import Engine
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Plan

# Bytes that a micro-batch may take where the caller sets no limit, and of how many samples the caches alone count.
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
        asked = require_positive_int("micro_batch", asked)
    if memory_limit is not None:
        memory_limit = require_positive_int("memory_limit", memory_limit)
        if not engine.plans:
            raise ArgumentError(
                f"memory_limit: the {engine.name} engine cannot keep to one; its memory is the model's own"
            )
    most = max(1, min(n, engine.micro_batch))
    if plan is None or not engine.plans:
        return most if asked is None else asked
    if engine.padded(plan, options):
        most = LEAST_MICRO_BATCH

    limit = DEFAULT_MEMORY if memory_limit is None else memory_limit

    def memory(batch: int) -> int:
        return engine.schedule(plan, batch, options).memory

    def fits(batch: int) -> bool:
        schedule = engine.schedule(plan, batch, options)
        # Without a limit from the caller, weights that take it all are no reason to compute every sample alone.
        few = memory_limit is None and batch <= LEAST_MICRO_BATCH
        return (schedule.cache_bytes if few else schedule.memory) <= limit

    size = next((size for size in range(most, 1, -1) if fits(size)), 1) if asked is None else asked
    if memory_limit is not None and memory(size) > memory_limit:
        raise ArgumentError(f"memory_limit: a micro-batch of {size} needs {memory(size)} bytes, got {memory_limit}")
    return size
