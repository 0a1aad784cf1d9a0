"""Nearest code in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address, strided_address
from fastvq.ops.dispatch import memory_reason
from fastvq.ops.nearest_code.options import Options, Statistics, StatisticsOptions

# The numbers of the extension's element types.
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(x: Tensor, codebook: Tensor) -> str | None:
    reason = memory_reason(x) or memory_reason(codebook)
    if torch.float64 in (x.dtype, codebook.dtype):
        reason = reason or "it computes in float32, and the tensors are float64"
    if x.shape[-1] == 0:
        reason = reason or "the vectors have no elements"
    return reason or _engine.why_unavailable()


def indices(x: Tensor, codebook: Tensor, options: Options) -> Tensor:
    return cpp_indices(x, codebook)


def statistics(x: Tensor, codebook: Tensor, mask: Tensor | None, options: StatisticsOptions) -> Statistics:
    return cpp_statistics(x, codebook, mask)


def cpp_indices(x: Tensor, codebook: Tensor, *, threads: int | None = None, kernels: str = "auto") -> Tensor:
    """`nearest_code` in C++, with PyTorch's number of threads and the widest instruction set unless told otherwise."""
    indices = torch.empty(x.shape[:2], dtype=torch.int64)
    for part, codes, found in zip(x, codebook, indices, strict=True):
        _run_cpp(part, codes, found, None, None, threads, kernels)
    return indices


def cpp_statistics(
    x: Tensor, codebook: Tensor, mask: Tensor | None, *, threads: int | None = None, kernels: str = "auto"
) -> Statistics:
    """`nearest_code_statistics` in C++; see `cpp_indices`."""
    indices = torch.empty(x.shape[:2], dtype=torch.int64)
    counts = torch.empty(codebook.shape[:2], dtype=torch.int64)
    sums = torch.empty(codebook.shape, dtype=torch.float32)
    errors = torch.empty(x.shape[:1], dtype=torch.float32)
    for head, (part, codes) in enumerate(zip(x, codebook, strict=True)):
        wanted = None if mask is None else mask[head].contiguous()
        filled = indices, counts, sums, errors
        if len(x) > 1:
            # Only addresses are taken, and those of the first head are the tensors' own.
            filled = indices[head], counts[head], sums[head], errors[head]
        _run_cpp(part, codes, filled[0], wanted, filled[1:], threads, kernels)
    return errors, sums, counts, indices


def _run_cpp(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
    threads: int | None,
    kernels: str,
) -> None:
    """x [N, D], codebook [K, D]; fills indices, and counts, sums and squared error if given."""
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = codebook.float().contiguous()
    (rows, depth), num_codes = x.shape, codes.shape[0]
    filled = (0, 0, 0)
    if statistics is not None:
        counts, sums, error = statistics
        filled = (
            address("counts", counts, torch.int64, num_codes),
            address("sums", sums, torch.float32, num_codes * depth),
            address("squared_error", error, torch.float32, 1),
        )
    _engine.require().nearest_codes(
        strided_address("x", x, x.dtype, (rows, depth)),
        _ELEMENTS[x.dtype],
        rows,
        x.stride(0),
        depth,
        address("codebook", codes, torch.float32, num_codes * depth),
        num_codes,
        address("indices", indices, torch.int64, rows),
        0 if mask is None else address("mask", mask, torch.bool, rows),
        *filled,
        torch.get_num_threads() if threads is None else threads,
        kernels,
    )
