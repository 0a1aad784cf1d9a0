"""All levels of a residual quantiser in C++, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address, strided_address
from fastvq.ops.nearest_code import cpp
from fastvq.ops.residual_codes.options import Codes, Options, Statistics, StatisticsOptions


def why_not(x: Tensor, codebooks: Tensor) -> str | None:
    return cpp.why_not(x, codebooks)


def codes(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: Options) -> Codes:
    return cpp_codes(x, codebooks, depths)


def statistics(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: StatisticsOptions) -> Statistics:
    return cpp_statistics(x, codebooks, depths)


def cpp_codes(
    x: Tensor, codebooks: Tensor, depths: Tensor | None, *, threads: int | None = None, kernels: str = "auto"
) -> Codes:
    """`residual_codes` in C++, with PyTorch's threads and the widest instruction set unless told otherwise."""
    return _run_cpp(x, codebooks, depths, None, threads, kernels)


def cpp_statistics(
    x: Tensor, codebooks: Tensor, depths: Tensor | None, *, threads: int | None = None, kernels: str = "auto"
) -> Statistics:
    """`residual_codes_statistics` in C++; see `cpp_codes`."""
    counts = torch.empty(codebooks.shape[:2], dtype=torch.int64)
    sums = torch.empty(codebooks.shape, dtype=torch.float32)
    errors = torch.empty(codebooks.shape[:1], dtype=torch.float32)
    return errors, sums, counts, *_run_cpp(x, codebooks, depths, (counts, sums, errors), threads, kernels)


def _run_cpp(
    x: Tensor,
    codebooks: Tensor,
    depths: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
    threads: int | None,
    kernels: str,
) -> Codes:
    """x [N, D], codebooks [Q, K, D], depths [N]; fills counts, sums and squared errors if given."""
    x = x.float()
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, depth), (levels, num_codes, _) = x.shape, codebooks.shape
    # One codebook that all levels share is made ready once.
    shared = levels == 1 or codebooks.stride(0) == 0
    stored = (codebooks[0] if shared else codebooks).float().contiguous()
    depths = None if depths is None else depths.to(torch.int64).contiguous()
    indices = torch.empty(rows, levels, dtype=torch.int64)
    total = torch.empty(rows, depth, dtype=torch.float32)
    filled = (0, 0, 0)
    if statistics is not None:
        counts, sums, errors = statistics
        filled = (
            address("counts", counts, torch.int64, levels * num_codes),
            address("sums", sums, torch.float32, levels * num_codes * depth),
            address("squared_errors", errors, torch.float32, levels),
        )
    _engine.require().residual_codes(
        strided_address("x", x, torch.float32, (rows, depth)),
        rows,
        x.stride(0),
        depth,
        address("codebooks", stored, torch.float32, stored.numel()),
        0 if shared else num_codes * depth,
        levels,
        num_codes,
        0 if depths is None else address("depths", depths, torch.int64, rows),
        address("indices", indices, torch.int64, rows * levels),
        address("quantized", total, torch.float32, rows * depth),
        *filled,
        torch.get_num_threads() if threads is None else threads,
        kernels,
    )
    return total, indices
