"""The backends of nearest code, for x [H, N, D] and codebook [H, K, D] that the public functions have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address, strided_address
from fastvq.errors import ArgumentError
from fastvq.ops.dispatch import nearest_code_backends, select_backend
from fastvq.ops.nearest_code_reference import indices_reference, statistics_reference, wide_dtype

__all__ = ["cpp_indices", "cpp_statistics", "nearest_code", "nearest_code_statistics", "wide_dtype"]

# The numbers of the extension's element types.
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def nearest_code(x: Tensor, codebook: Tensor, mode: str, check_finite: bool, backend: str | None) -> Tensor:
    """Indices [H, N]."""
    chosen = select_backend("nearest_code", nearest_code_backends(x, codebook), backend)
    if check_finite:
        _require_finite(x, None)
    if chosen == "triton":
        from fastvq.kernels import nearest_code as kernels

        return kernels.nearest_code(x, codebook, mode=mode)
    if chosen == "cpp":
        return cpp_indices(x, codebook)
    return indices_reference(x, codebook).clamp(min=0)


def nearest_code_statistics(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    mode: str,
    deterministic: bool,
    check_finite: bool,
    backend: str | None,
) -> Statistics:
    """Squared error [H], sums [H, K, D], counts [H, K], indices [H, N]."""
    chosen = select_backend("nearest_code", nearest_code_backends(x, codebook), backend)
    if check_finite:
        _require_finite(x, mask)
    if chosen == "triton":
        from fastvq.kernels import nearest_code as kernels

        return kernels.nearest_code_statistics(x, codebook, mask, mode=mode, deterministic=deterministic)
    if chosen == "cpp":
        return cpp_statistics(x, codebook, mask)
    found = indices_reference(x, codebook)
    assigned = found if mask is None else torch.where(mask, found, -1)
    return *statistics_reference(x, codebook, assigned, mask), found.clamp(min=0)


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


def _require_finite(x: Tensor, mask: Tensor | None) -> None:
    bad = ~x.isfinite().all(-1)
    if mask is not None:
        bad &= mask
    if bad.any():
        head, row = (int(i) for i in bad.nonzero()[0])
        where = f"[{head}, {row}]" if x.shape[0] > 1 else f"[{row}]"
        raise ArgumentError(
            f"x: expected finite values, got NaN or infinity in {int(bad.sum())} of {bad.numel()} vectors,"
            f" the first at {where}"
        )
