"""The least time that sampling takes on a GPU: arithmetic, bytes, and blocks that have to wait for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastvq.sampling import Explanation

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Rates:
    """What was measured on this GPU.

    Attributes:
        flops: FLOP/s of the fastest library product, by precision.
        hop: seconds from a block raising a flag to another block having seen it.
        copy, cached: bytes/s, read and written together, of a copy between large buffers, and between two that stay in
            the second-level cache.
        cache_bytes: of the second-level cache.
        shared_bytes: that all multiprocessors together can hold weights in.
    """

    flops: Mapping[str, float]
    hop: float
    copy: float
    cached: float
    cache_bytes: int
    shared_bytes: int

    def reading(self, times: int, size: int) -> float:
        """Seconds of reading ``size`` bytes so many times over."""
        return times * size / (self.cached if size <= self.cache_bytes else self.copy)


class Least(NamedTuple):
    """Seconds of a phase's arithmetic, bytes and waits, which overlap: the longest of the three counts."""

    arithmetic: float
    reading: float
    waiting: float


def phases(
    explanation: Explanation, batch: int, precision: str, rates: Rates, hops: int | None = None
) -> tuple[Least, Least]:
    """Row phase and step phase of a micro-batch in one precision.

    Args:
        hops: waits per position; None for one at every level of the plan, which is how often a position's blocks
            depend on each other's results.

    The row phase does its products at the best library rate, or reads its weights once per row. The step phase waits
    for one flag at each level of each position, or does its products, or reads the weights that do not fit into shared
    memory from the second-level cache at each position. Everything else (activations, drawing, starting kernels) is
    left out, so an engine that spreads a position over the blocks of one GPU cannot be faster.
    """
    height, width = explanation.shape
    row_bytes, step_bytes = (
        count // 4 * _BYTES[precision] for count in (explanation.row_weight_bytes, explanation.step_weight_bytes)
    )
    streamed = max(0, step_bytes - rates.shared_bytes)
    waits = height * width * (explanation.levels if hops is None else hops)
    rate = rates.flops[precision]
    return (
        Least(explanation.row_flops * batch / rate, rates.reading(height, row_bytes), 0.0),
        Least(explanation.step_flops * batch / rate, rates.reading(height * width, streamed), waits * rates.hop),
    )


def floor_seconds(explanation: Explanation, batch: int, precision: str, rates: Rates, hops: int | None = None) -> float:
    """Of both phases, one after the other."""
    return sum(max(phase) for phase in phases(explanation, batch, precision, rates, hops))
