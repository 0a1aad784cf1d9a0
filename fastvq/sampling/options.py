"""How an engine computes, where that is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastvq._check import require_bool, require_choice, require_positive_int
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.sampling.cpu_engine import require_kernels
from fastvq.sampling.state import ROW_KERNELS, RowKernel, require_triton

Precision = Literal["float32", "bfloat16"]

# Fastest first; "auto" takes the first that can run.
ENGINES = ("cuda", "cpu", "torch", "naive")
PRECISIONS = ("float32", "bfloat16")
KERNELS = ("auto", "avx512", "avx2", "baseline")
_MOST_THREADS = 1024
# Engines whose weights can be bfloat16.
_BFLOAT16 = ("cuda", "cpu")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes.

    Attributes:
        precision: of the weights in the step phase of the ``cuda`` and ``cpu`` engines; sums are float32 either way.
            ``bfloat16`` halves the memory traffic and is not exact. With 8 samples or more the ``cuda`` engine then
            uses matrix instructions, for which it rounds what the weights are multiplied by as well.
        threads: of the ``cpu`` engine, 1 to 1024; None for PyTorch's number, or fewer where a position has little work.
        kernels: instruction set of the ``cpu`` engine: ``auto``, ``avx512``, ``avx2`` or ``baseline``.
        row_kernel: what computes the convolutions over the rows above in the cached engines: ``library`` (PyTorch's)
            or ``triton`` (the project's own kernel, on a GPU). Both are float32.
        cuda_graph: the ``cuda`` engine records a whole grid once and replays it, see
            :mod:`fastvq.sampling.cuda_graph`.

    Raises:
        ArgumentError, ArgumentTypeError: values that are not among these.
    """

    precision: Precision = "float32"
    threads: int | None = None
    kernels: str = "auto"
    row_kernel: RowKernel = "library"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("kernels", self.kernels, KERNELS)
        require_choice("row_kernel", self.row_kernel, ROW_KERNELS)
        if self.threads is not None:
            require_positive_int("threads", self.threads, maximum=_MOST_THREADS)
        require_bool("cuda_graph", self.cuda_graph)

    def check(self, engine: str, device: torch.device | None = None) -> None:
        """Refuse what an engine does not have and what would change nothing in silence.

        Args:
            device: of the prior; with it, kernels that are not available there are refused as well.

        Raises:
            ArgumentError: there is such an option.
            UnavailableError: the row kernel cannot run on the device.
        """
        require_choice("engine", engine, ENGINES)
        check_precision(engine, self.precision)
        if self.row_kernel != "library" and engine == "naive":
            raise ArgumentError(f"row_kernel: the naive engine has no row phase, got {self.row_kernel!r}")
        if self.cuda_graph and engine != "cuda":
            raise ArgumentError(f"cuda_graph: only the cuda engine has one, the engine here is {engine!r}")
        if device is not None and self.row_kernel == "triton":
            require_triton(device)
        if device is not None and engine == "cpu":
            require_kernels(self.kernels)


def check_precision(engine: str, precision: str) -> None:
    require_choice("precision", precision, PRECISIONS)
    if precision == "bfloat16" and engine not in _BFLOAT16:
        raise ArgumentError(
            f"precision: only the cuda and cpu engines have bfloat16 weights, the engine here is {engine!r}"
        )


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
