"""Nearest code, and the statistics of assignment that move a codebook, in one pass.

No backend ever holds the distances of all vectors to all codes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_choice, require_dense, require_floating, require_tensor
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.ops import nearest_code_backends as backends
from fastvq.ops.dispatch import is_batched, is_differentiated

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
        squared_error: [H], sum of |x - codebook[index]|^2, differentiable in both.
    """

    indices: Tensor
    counts: Tensor
    sums: Tensor
    squared_error: Tensor


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
            faster (GPU): the chosen code may be farther than the nearest by about 2^-7 |x| max|c|, where codes
            count that are up to some 10 times as long as the vectors or the shortest code.
        check_finite: raise for a vector that is not finite, instead of giving it index 0. Reads x once more, and waits
            for a GPU.
        backend: None for the first that can run, ``"cpp"`` (CPU), ``"triton"`` (GPU) or ``"torch"``; see
            `fastvq.ops.explain_backend`.

    Returns:
        int64 [N] or [H, N]: argmin over k of |x - codebook[k]|^2. Computed in float32 (float64 for float64 input) as
        |c|^2 / 2 - x.c, with both sides shifted by a centre of the codes where that helps. The distance of the code
        found exceeds the least one by rounding alone: with u = 2^-24 at most 16 u (|x| + |c|)^2 for D <= 256, c being
        the farther from the origin of the code found and the nearest, whatever the other codes are. Beyond D = 256,
        sqrt(D) in place of 16, since errors of D products add up like a random walk. Among equal codes the one of
        lowest index (``torch`` may return another copy). Codes that are not finite are never chosen. A vector for which
        no code has a finite score (NaN, infinite, too long) has index 0.

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
    indices = torch.ops.fastvq.nearest_code(vectors, codes, mode, check_finite, backend)
    return indices if x.ndim == 3 else indices.squeeze(0)


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
        As `nearest_code`; also a mask that does not fit.

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
    arguments = (vectors, codes, mask, mode, deterministic, check_finite, backend)
    if is_batched() or is_differentiated():
        found = _Statistics.apply(*arguments)
    else:
        found = torch.ops.fastvq.nearest_code_statistics(*arguments)
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


# Registered by hand: torch.library.custom_op costs ten times as much per call. The only output with a gradient comes
# first, as torch.library.opcheck wants it.
_library = torch.library.Library("fastvq", "FRAGMENT")
_library.define("nearest_code(Tensor x, Tensor codebook, str mode, bool check_finite, str? backend) -> Tensor")
_library.define(
    "nearest_code_statistics(Tensor x, Tensor codebook, Tensor? mask, str mode, bool deterministic, bool check_finite,"
    " str? backend) -> (Tensor squared_error, Tensor sums, Tensor counts, Tensor indices)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("nearest_code", backends.nearest_code, _device)
    _library.impl("nearest_code_statistics", backends.nearest_code_statistics, _device)


@torch.library.register_fake("fastvq::nearest_code", lib=_library)
def _(x: Tensor, codebook: Tensor, mode: str, check_finite: bool, backend: str | None) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


@torch.library.register_fake("fastvq::nearest_code_statistics", lib=_library)
def _(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    mode: str,
    deterministic: bool,
    check_finite: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = backends.wide_dtype(x, codebook)
    return (
        x.new_empty(x.shape[:1], dtype=dtype),
        x.new_empty(codebook.shape, dtype=dtype),
        x.new_empty(codebook.shape[:2], dtype=torch.int64),
        x.new_empty(x.shape[:2], dtype=torch.int64),
    )


def _keep_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, codebook, mask, *_ = inputs
    _, sums, counts, indices = output
    ctx.save_for_backward(x, codebook, mask, indices)
    ctx.mark_non_differentiable(sums, counts, indices)


def _backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """squared_error = sum over n of |x_n - c_i(n)|^2; where the nearest code changes it has no derivative."""
    x, codebook, mask, indices = ctx.saved_tensors  # type: ignore[attr-defined]
    upstream, grad_codebook = grads[0], None
    if upstream is None:
        return (None,) * 7
    codes = codebook.to(upstream.dtype)
    places = indices[..., None].expand(x.shape)
    gap = (x.to(upstream.dtype) - codes.gather(1, places)) * (2 * upstream[:, None, None])
    if mask is not None:
        gap = torch.where(mask[..., None], gap, 0)
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        grad_codebook = torch.zeros_like(codes).scatter_add(1, places, -gap).to(codebook.dtype)
    return gap.to(x.dtype), grad_codebook, None, None, None, None, None


torch.library.register_autograd(
    "fastvq::nearest_code_statistics", _backward, setup_context=_keep_for_backward, lib=_library
)


def _folded(value: Tensor, axis: int | None, batch: int) -> Tensor:
    """[H, ...] with an axis of the batch somewhere, or without, as [batch * H, ...]."""
    value = value.expand(batch, *value.shape) if axis is None else value.movedim(axis, 0)
    return value.reshape(-1, *value.shape[2:])


@torch.library.register_vmap("fastvq::nearest_code", lib=_library)
def _(info: Any, axes: tuple[int | None, ...], x: Tensor, codebook: Tensor, *options: Any) -> tuple[Tensor, int]:
    batch = info.batch_size
    if axes[0] is not None and axes[1] is None:
        # One codebook for all: the batch is more vectors, which need no copies of the codes.
        vectors = x.movedim(axes[0], 1)  # [H, batch, N, D]
        indices = torch.ops.fastvq.nearest_code(vectors.flatten(1, 2), codebook, *options)
        return indices.unflatten(1, (batch, -1)) if vectors.shape[2] else indices.new_empty(vectors.shape[:3]), 1
    indices = torch.ops.fastvq.nearest_code(_folded(x, axes[0], batch), _folded(codebook, axes[1], batch), *options)
    return indices.unflatten(0, (batch, -1)), 0


class _Statistics(torch.autograd.Function):
    """The registered operation for transforms of torch.func and forward mode, which its own gradient does not serve."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.fastvq.nearest_code_statistics(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, codebook, mask, *_ = inputs
        _keep_for_backward(ctx, inputs, output)
        ctx.save_for_forward(x, codebook, mask, output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_codebook: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, codebook, mask, indices = ctx.saved_tensors
        places = indices[..., None].expand(x.shape)
        wide = backends.wide_dtype(x, codebook)
        gap, slope = x.to(wide) - codebook.to(wide).gather(1, places), torch.zeros(x.shape, dtype=wide, device=x.device)
        if of_x is not None:
            slope = slope + of_x
        if of_codebook is not None:
            slope = slope - of_codebook.to(wide).gather(1, places)
        product = 2 * gap * slope
        if mask is not None:
            product = torch.where(mask[..., None], product, 0)
        return product.sum((1, 2)), None, None, None

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], int]:
        tensors = [
            None if value is None else _folded(value, axis, info.batch_size)
            for value, axis in zip(inputs[:3], axes[:3], strict=True)
        ]
        found = _Statistics.apply(*tensors, *inputs[3:])
        return tuple(value.unflatten(0, (info.batch_size, -1)) for value in found), 0
