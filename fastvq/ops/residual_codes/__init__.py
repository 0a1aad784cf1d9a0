"""Codes of all levels of a residual quantiser, and the statistics that move their codebooks, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq._check import INTEGER_DTYPES, require_choice, require_dense, require_floating, require_tensor
from fastvq._nvtx import annotate
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops._registered import learns
from fastvq.ops.dispatch import is_batched, is_differentiated, runs_directly
from fastvq.ops.nearest_code import MODES, Mode
from fastvq.ops.residual_codes import backends
from fastvq.ops.residual_codes.options import Options, StatisticsOptions


class ResidualCodes(NamedTuple):
    """Result of `residual_codes`.

    Attributes:
        indices: int64 [N, Q]; -1 at levels that a vector takes no part in.
        quantized: [N, D], the sum of each vector's codes, in float32 (float64 for float64 input).
    """

    indices: Tensor
    quantized: Tensor


class ResidualStatistics(NamedTuple):
    """Result of `residual_codes_statistics`.

    Attributes:
        indices, quantized: as of `ResidualCodes`.
        counts: int64 [Q, K], how many vectors each code has.
        sums: [Q, K, D], the sum of the residuals of these vectors, in float32 (float64 for float64 input).
        squared_errors: [Q], sum of ``|r_q - code|^2`` over the vectors of level q, differentiable in x.
    """

    indices: Tensor
    quantized: Tensor
    counts: Tensor
    sums: Tensor
    squared_errors: Tensor


@annotate("residual_codes")
def residual_codes(
    x: Tensor,
    codebooks: Tensor,
    *,
    depths: Tensor | None = None,
    mode: Mode = "exact",
    backend: str | None = None,
) -> ResidualCodes:
    """Codes of Q levels: with r_0 = x, level q has the code nearest to r_q, and r_{q+1} = r_q - code.

    Args:
        x: vectors [N, D]; float32, float64, bfloat16 or float16. Residuals are kept in float32 at least.
        codebooks: codes [Q, K, D], floating point, Q and K >= 1, on the same device; constants, without gradient.
            `Tensor.expand` makes one codebook that of all levels, without copies.
        depths: integers [N], how many levels a vector takes part in, from the first on; None: in all. Those beyond
            leave its residual as it is.
        mode: as for `fastvq.ops.nearest_code`.
        backend: None for the first that can run: ``"cpp"`` (CPU) and ``"triton"`` (GPU, D up to 256) take all levels
            in one pass, ``"levels"`` calls `fastvq.ops.nearest_code` for one after the other, ``"torch"`` does it in
            plain PyTorch; see `fastvq.ops.explain_backend`.

    Returns:
        See `ResidualCodes`. Each level's code is that of `fastvq.ops.nearest_code` for its residual; on a CPU bit for
        bit. A vector without a finite score has code 0, which is subtracted like any other.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, dtypes or devices that do not fit, or codebooks that are learnt.
        UnavailableError: the backend asked for cannot run here; or under transforms of torch.func and in forward mode.

    Zeghidour et al. 2021, arXiv 2107.03312, algorithm 1.
    """
    _check(x, codebooks, depths, mode)
    direct = runs_directly(x, codebooks, optional=(depths,)) and not learns(x)
    quantized, indices = backends.residual_codes(
        x.detach(), codebooks, depths, options=Options(mode, backend), direct=direct
    )
    return ResidualCodes(indices, quantized)


@annotate("residual_codes_statistics")
def residual_codes_statistics(
    x: Tensor,
    codebooks: Tensor,
    *,
    depths: Tensor | None = None,
    mode: Mode = "exact",
    deterministic: bool | None = None,
    backend: str | None = None,
) -> ResidualStatistics:
    """`residual_codes`, and in the same pass the counts, sums and squared errors of every level.

    Args:
        x, codebooks, depths, mode, backend: as for `residual_codes`.
        deterministic: as for `fastvq.ops.nearest_code_statistics`.

    Returns:
        See `ResidualStatistics`; of each level what `fastvq.ops.nearest_code_statistics` gives for its residual, on a
        CPU bit for bit. All levels are searched in the codebooks as they are given.

    Raises:
        ArgumentError, ArgumentTypeError, UnavailableError: as `residual_codes`.
    """
    _check(x, codebooks, depths, mode)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    options = StatisticsOptions(mode, deterministic, backend)
    errors, sums, counts, quantized, indices = backends.residual_codes_statistics(
        x,
        codebooks,
        depths,
        options=options,
        direct=runs_directly(x, codebooks, optional=(depths,)),
        learns=learns(x),
    )
    return ResidualStatistics(indices, quantized, counts, sums, errors)


def _check(x: object, codebooks: object, depths: object, mode: str) -> None:
    x, codebooks = require_tensor("x", x), require_tensor("codebooks", codebooks)
    require_floating("x", x)
    require_floating("codebooks", codebooks)
    if x.ndim != 2:
        raise ArgumentError(f"x: expected shape [N, D], got {list(x.shape)}")
    if codebooks.ndim != 3 or codebooks.shape[2] != x.shape[1] or 0 in codebooks.shape[:2]:
        raise ArgumentError(
            f"codebooks: expected shape [Q, K, {x.shape[1]}] with Q and K of 1 or more, got {list(codebooks.shape)}"
        )
    if codebooks.device != x.device:
        raise ArgumentError(f"codebooks: expected device {x.device} as for x, got {codebooks.device}")
    if learns(codebooks):
        raise ArgumentError("codebooks: expected a tensor without gradient (use detach()), got requires_grad=True")
    if depths is not None:
        depths = require_tensor("depths", depths)
        if depths.dtype not in INTEGER_DTYPES:
            raise ArgumentTypeError(f"depths: expected integers, got {depths.dtype}")
        require_dense("depths", depths)
        if depths.shape != x.shape[:1]:
            raise ArgumentError(f"depths: expected shape {list(x.shape[:1])}, got {list(depths.shape)}")
        if depths.device != x.device:
            raise ArgumentError(f"depths: expected device {x.device} as for x, got {depths.device}")
    require_choice("mode", mode, MODES)
    if is_batched() or is_differentiated():
        raise UnavailableError("residual_codes: transforms of torch.func and forward mode take levels one at a time")
