"""How an engine computes, where that is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastvq._check import require_bool, require_choice, require_positive_int
from fastvq.errors import ArgumentError, ArgumentTypeError

Precision = Literal["float32", "bfloat16"]
RowKernel = Literal["library"]

PRECISIONS = ("float32", "bfloat16")
KERNELS = ("auto", "avx512", "avx2", "baseline")
_MOST_THREADS = 1024


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes.

    Attributes:
        precision: of the weights of the ``cpu`` and ``cuda`` engines; sums are float32 either way. ``bfloat16`` halves
            the memory traffic and is not exact. The ``cuda`` engine rounds what weights are multiplied by as well,
            except in library convolutions.
        threads: of the ``cpu`` engine, 1 to 1024; None for PyTorch's number. Steps with little work take fewer.
        kernels: instruction set of the ``cpu`` engine: ``auto``, ``avx512``, ``avx2`` or ``baseline``.
        row_kernel: what works out in the ``cuda`` engine what is known when a row starts: None for the products that it
            has along a front as well, where those can run; ``library`` for PyTorch's convolutions, in float32, to
            compare with. The engine samples in raster order if this is given: along a front it has no row phase.
        tile: columns of a row that are sampled one after the other before the front moves on, 1 to the width of the
            grid, which is raster order; see :class:`fastvq.sampling.plan.Front`. None for what should be fastest. Codes
            do not depend on it. Priors with attention are sampled in raster order alone. The ``cuda`` engine has
            tiles of one column and raster order.
        cuda_graph: the ``cuda`` engine records a whole grid once and replays it, see
            :mod:`fastvq.sampling.engines.cuda_graph`. Along a front every call records one step, which serves for all,
            and with this option keeps it and its caches for later calls.

    Raises:
        ArgumentError, ArgumentTypeError: values that are not among these.
    """

    precision: Precision = "float32"
    threads: int | None = None
    kernels: str = "auto"
    row_kernel: RowKernel | None = None
    tile: int | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("kernels", self.kernels, KERNELS)
        if self.row_kernel not in (None, "library"):
            raise ArgumentError(
                f"row_kernel: expected None, for the cuda engine's own products, or 'library', got {self.row_kernel!r}"
            )
        if self.threads is not None:
            threads = require_positive_int("threads", self.threads, maximum=_MOST_THREADS)
            object.__setattr__(self, "threads", threads)
        if self.tile is not None:
            object.__setattr__(self, "tile", require_positive_int("tile", self.tile))
        require_bool("cuda_graph", self.cuda_graph)


def engine_options(precision: Precision, options: EngineOptions | None) -> EngineOptions:
    """What the two arguments of that name mean together.

    Raises:
        ArgumentError, ArgumentTypeError: they contradict each other, or are something else.
    """
    if options is None:
        return EngineOptions(precision)
    if not isinstance(options, EngineOptions):
        raise ArgumentTypeError(f"options: expected EngineOptions or None, got {type(options).__name__}")
    if precision not in ("float32", options.precision):
        raise ArgumentError(f"precision: got {precision!r}, but options say {options.precision!r}")
    return options
