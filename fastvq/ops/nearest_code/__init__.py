"""Nearest code, and the statistics of assignment that move a codebook, in one pass.

No backend ever holds the distances of all vectors to all codes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_choice, require_dense, require_floating, require_tensor
from fastvq._nvtx import annotate
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.ops._registered import learns
from fastvq.ops.dispatch import is_batched, is_differentiated, runs_directly
from fastvq.ops.nearest_code import backends
from fastvq.ops.nearest_code.options import Options, StatisticsOptions

Metric = Literal["euclidean", "cosine"]
Mode = Literal["exact", "fast"]
METRICS: tuple[Metric, ...] = ("euclidean", "cosine")
MODES: tuple[Mode, ...] = ("exact", "fast")


class CodeStatistics(NamedTuple):
    """Result of `nearest_code_statistics`; H stands for the axis of heads, absent where x has none.

    Attributes:
        indices: int64 [H, N], as `nearest_code` returns.
        counts: int64 [H, K], how many vectors each code has.
        sums: [H, K, D], the sum of these vectors, in float32 (float64 for float64 input).
        squared_error: [H], sum of ``|x - codebook[index]|^2``, differentiable in both.
    """

    indices: Tensor
    counts: Tensor
    sums: Tensor
    squared_error: Tensor


@annotate("nearest_code")
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    mode: Mode = "exact",
    check_finite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Index of the code nearest to each vector.

    Args:
        x: vectors [N, D], or [H, N, D] for H heads; float32, float64, bfloat16 or float16.
        codebook: codes [K, D], or [H, K, D], a codebook per head; floating point, K >= 1, on the same device.
        metric: ``euclidean``, or ``cosine``: both sides are scaled to unit length first.
        mode: ``exact`` gives the float32 result everywhere. ``fast`` allows scores of bfloat16 products where that is
            faster (GPU): the chosen code may be farther than the nearest by about ``2^-7 |x| max|c|``, where codes
            count that are up to some 10 times as long as the vectors or the shortest code.
        check_finite: raise for a vector that is not finite, instead of giving it index 0. Reads x once more, and waits
            for a GPU.
        backend: None for the first that can run, ``"cpp"`` (CPU), ``"triton"`` (GPU) or ``"torch"``; see
            `fastvq.ops.explain_backend`.

    Returns:
        int64 [N] or [H, N]: argmin over k of ``|x - codebook[k]|^2``. Computed in float32 (float64 for float64 input)
        as ``|c|^2 / 2 - x.c``, with both sides shifted by a centre of the codes where that helps. The distance of the
        code found exceeds the least one by rounding alone: with u = 2^-24 at most ``16 u (|x| + |c|)^2`` for D <= 256,
        c being the farther from the origin of the code found and the nearest, whatever the other codes are. Beyond
        D = 256, sqrt(D) in place of 16, since errors of D products add up like a random walk. Among equal codes the one
        of lowest index (``torch`` may return another copy). Codes that are not finite are never chosen. A vector for
        which no code has a finite score (NaN, infinite, too long) has index 0.

        All this holds for lengths of vectors and codes from about 1e-18 to 1e18, whose squares are normal float32
        numbers. Codes longer than about 1e19 are never chosen, and where everything is shorter than about 1e-19 all
        codes are the same and the index may be 0.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, dtypes or devices that do not fit; values that are not finite.
        UnavailableError: the backend asked for cannot run here.

    van den Oord et al. 2017, equations 1 and 2.
    """
    x, codebook = _check(x, codebook, metric, mode)
    vectors, codes = _heads(x, codebook, metric)
    options = Options(mode, check_finite, backend)
    direct = runs_directly(vectors, codes) and not learns(vectors, codes)
    indices: Tensor = backends.nearest_code(vectors, codes, options=options, direct=direct)
    return indices if x.ndim == 3 else indices.squeeze(0)


@annotate("nearest_code_statistics")
def nearest_code_statistics(
    x: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: Metric = "euclidean",
    mode: Mode = "exact",
    deterministic: bool | None = None,
    check_finite: bool = False,
    backend: str | None = None,
) -> CodeStatistics:
    """`nearest_code`, and in the same pass the counts, sums and squared error that training needs.

    Args:
        x, codebook, metric, mode, check_finite, backend: as for `nearest_code`. With ``cosine`` sums and errors are of
            the vectors scaled to unit length.
        mask: bool [N] or [H, N]; vectors where it is False are given an index but left out of everything else.
        deterministic: the same bits in every run, without atomic additions on a GPU; None follows
            ``torch.use_deterministic_algorithms``. On a CPU results never depend on the run or the number of threads.

    Returns:
        See `CodeStatistics`. Vectors that are not finite are left out of counts and sums, so that they cannot poison a
        codebook, while squared_error shows them. Nothing is averaged over processes or applied to the codebook.

    Raises:
        ArgumentError, ArgumentTypeError, UnavailableError: as `nearest_code`; also a mask that does not fit.

    van den Oord et al. 2017, appendix A.1.
    """
    x, codebook = _check(x, codebook, metric, mode)
    if mask is not None:
        if require_tensor("mask", mask).dtype != torch.bool:
            raise ArgumentTypeError(f"mask: expected torch.bool, got {mask.dtype}")
        require_dense("mask", mask)
        if mask.shape != x.shape[:-1]:
            raise ArgumentError(f"mask: expected shape {list(x.shape[:-1])}, got {list(mask.shape)}")
        if mask.device != x.device:
            raise ArgumentError(f"mask: expected device {x.device} as for x, got {mask.device}")
        mask = mask if x.ndim == 3 else mask.unsqueeze(0)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    vectors, codes = _heads(x, codebook, metric)
    options = StatisticsOptions(mode, deterministic, check_finite, backend)
    if is_batched() or is_differentiated():
        found = backends.Transformed.apply(vectors, codes, mask, *options)
    else:
        direct = runs_directly(vectors, codes, optional=(mask,))
        learning = learns(vectors, codes)
        found = backends.nearest_code_statistics(vectors, codes, mask, options=options, direct=direct, learns=learning)
    error, sums, counts, indices = found if x.ndim == 3 else (value.squeeze(0) for value in found)
    return CodeStatistics(indices, counts, sums, error)


def _check(x: object, codebook: object, metric: str, mode: str) -> tuple[Tensor, Tensor]:
    x, codebook = require_tensor("x", x), require_tensor("codebook", codebook)
    require_floating("x", x)
    require_floating("codebook", codebook)
    if x.ndim not in (2, 3):
        raise ArgumentError(f"x: expected shape [N, D] or [H, N, D], got {list(x.shape)}")
    expected = ["K", x.shape[1]] if x.ndim == 2 else [x.shape[0], "K", x.shape[2]]
    sizes = [size if want == "K" else want for size, want in zip(codebook.shape, expected, strict=False)]
    if codebook.ndim != x.ndim or list(codebook.shape) != sizes:
        raise ArgumentError(
            f"codebook: expected shape [{', '.join(map(str, expected))}], got {list(codebook.shape)}"
            f" for x of shape {list(x.shape)}"
        )
    if codebook.shape[-2] == 0:
        raise ArgumentError(f"codebook: expected at least one code, got shape {list(codebook.shape)}")
    if codebook.device != x.device:
        raise ArgumentError(f"codebook: expected device {x.device} as for x, got {codebook.device}")
    require_choice("metric", metric, METRICS)
    require_choice("mode", mode, MODES)
    return x, codebook


def _heads(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Both with an axis of heads, and scaled for the cosine."""
    if metric == "cosine":
        with torch.autocast(x.device.type, enabled=False):
            x, codebook = F.normalize(_wide(x), dim=-1), F.normalize(_wide(codebook), dim=-1)
    return (x, codebook) if x.ndim == 3 else (x.unsqueeze(0), codebook.unsqueeze(0))


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
