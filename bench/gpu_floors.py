"""The least time that sampling takes on a GPU: arithmetic, bytes, and blocks that have to wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

from bench.harness import Work
from bench.machine import Ceilings
from fastvq.sampling import Explanation

UNITS = {"float32": "cuda float32", "bfloat16": "cuda bfloat16"}
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class GpuRates:
    """What was measured on this GPU.

    Attributes:
        hop: seconds from a block raising a flag to another block having seen it.
        copy, cached: bytes/s, read and written together, of a copy between large buffers, and between two that stay in
            the second-level cache.
        cache_bytes: of the second-level cache.
        shared_bytes: that all multiprocessors together can hold weights in.
    """

    hop: float
    copy: float
    cached: float
    cache_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class DeviceWork(Work):
    """A part of the work on a GPU, where bytes and waiting overlap with arithmetic; the longest of the three counts.

    Attributes:
        rate: bytes/s at which ``bytes`` are read.
        waits: how often one block waits for another, one time after the other.
        wait_seconds: of each.
    """

    rate: float = 1.0
    waits: int = 0
    wait_seconds: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        arithmetic = self.flops / ceilings.rate_of(self.unit)
        return max(arithmetic, self.bytes / self.rate, self.waits * self.wait_seconds)


def work_of(
    explanation: Explanation, batch: int, precision: str, rates: GpuRates, hops: int | None = None
) -> list[DeviceWork]:
    """Row phase, then step phase of a micro-batch in one precision.

    Args:
        hops: waits per position; None for one at every level of the plan, which is how often a position's blocks
            depend on each other's results.

    The row phase does its products at the best library rate, or reads its weights once per row. The step phase waits
    for one flag at each level of each position, or does its products, or reads the weights that do not fit into shared
    memory from the second-level cache at each position. Everything else (activations, drawing, starting kernels) is
    left out, so an engine that spreads a position over the blocks of one GPU cannot be faster.
    """
    height, width = explanation.shape
    size, unit = _BYTES[precision], UNITS[precision]
    row_weights = explanation.row_weight_bytes // 4 * size
    step_weights = explanation.step_weight_bytes // 4 * size
    row_rate = rates.cached if row_weights <= rates.cache_bytes else rates.copy
    positions = height * width
    streamed = max(0, step_weights - rates.shared_bytes)
    step_rate = rates.cached if streamed <= rates.cache_bytes else rates.copy
    return [
        DeviceWork(
            "row phase",
            float(explanation.row_flops * batch),
            float(height * row_weights),
            row_weights,
            unit,
            rate=row_rate,
        ),
        DeviceWork(
            "step phase",
            float(explanation.step_flops * batch),
            float(positions * streamed),
            streamed,
            unit,
            rate=step_rate,
            waits=positions * (explanation.levels if hops is None else hops),
            wait_seconds=rates.hop,
        ),
    ]


def floor_seconds(work: list[DeviceWork], ceilings: Ceilings) -> float:
    return sum(part.seconds(ceilings) for part in work)
