"""The backends of nearest code, and the operations registered for it, for x [H, N, D] and codebook [H, K, D].

What a row runs is a module with ``indices`` and ``statistics``, see `fastvq.ops.nearest_code.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.ops._registered import Gradient, Registered
from fastvq.ops.dispatch import Backend, Backends, anywhere
from fastvq.ops.nearest_code import cpp, reference, triton
from fastvq.ops.nearest_code.options import Options, Statistics, StatisticsOptions

BACKENDS = Backends(
    "nearest_code",
    [
        Backend("cpp", cpp.why_not, cpp),
        Backend("torch", anywhere, reference),
        Backend("triton", triton.why_not, triton, gpu=True),
    ],
)


def _indices(x: Tensor, codebook: Tensor, options: Options) -> Tensor:
    chosen = BACKENDS.select(options.backend, x, codebook)
    if options.check_finite:
        _require_finite(x, None)
    found: Tensor = chosen.run.indices(x, codebook, options)
    return found


def _statistics(x: Tensor, codebook: Tensor, mask: Tensor | None, options: StatisticsOptions) -> Statistics:
    chosen = BACKENDS.select(options.backend, x, codebook)
    if options.check_finite:
        _require_finite(x, mask)
    found: Statistics = chosen.run.statistics(x, codebook, mask, options)
    return found


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


def _fake_indices(x: Tensor, codebook: Tensor, options: Options) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def _fake_statistics(x: Tensor, codebook: Tensor, mask: Tensor | None, options: StatisticsOptions) -> Statistics:
    dtype = reference.wide_dtype(x, codebook)
    return (
        x.new_empty(x.shape[:1], dtype=dtype),
        x.new_empty(codebook.shape, dtype=dtype),
        x.new_empty(codebook.shape[:2], dtype=torch.int64),
        x.new_empty(x.shape[:2], dtype=torch.int64),
    )


def _keep(ctx: Any, tensors: tuple[Any, ...], options: Any, outputs: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*tensors, outputs[3])


def _gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """squared_error = sum over n of |x_n - c_i(n)|^2; where the nearest code changes it has no derivative."""
    x, codebook, mask, indices = ctx.saved_tensors
    grad_codebook = None
    codes = codebook.to(upstream.dtype)
    places = indices[..., None].expand(x.shape)
    gap = (x.to(upstream.dtype) - codes.gather(1, places)) * (2 * upstream[:, None, None])
    if mask is not None:
        gap = torch.where(mask[..., None], gap, 0)
    if ctx.needs_input_grad[1]:
        grad_codebook = torch.zeros_like(codes).scatter_add(1, places, -gap).to(codebook.dtype)
    return gap.to(x.dtype), grad_codebook, None


def _folded(value: Tensor, axis: int | None, batch: int) -> Tensor:
    """[H, ...] with an axis of the batch somewhere, or without, as [batch * H, ...]."""
    value = value.expand(batch, *value.shape) if axis is None else value.movedim(axis, 0)
    return value.reshape(-1, *value.shape[2:])


def _over_batch(
    info: Any, axes: tuple[int | None, ...], x: Tensor, codebook: Tensor, *options: Any
) -> tuple[Tensor, int]:
    batch = info.batch_size
    if axes[0] is not None and axes[1] is None:
        # One codebook for all: the batch is more vectors, which need no copies of the codes.
        vectors = x.movedim(axes[0], 1)  # [H, batch, N, D]
        indices = torch.ops.fastvq.nearest_code(vectors.flatten(1, 2), codebook, *options)
        return indices.unflatten(1, (batch, -1)) if vectors.shape[2] else indices.new_empty(vectors.shape[:3]), 1
    indices = torch.ops.fastvq.nearest_code(_folded(x, axes[0], batch), _folded(codebook, axes[1], batch), *options)
    return indices.unflatten(0, (batch, -1)), 0


nearest_code = Registered(
    "nearest_code(Tensor x, Tensor codebook, str mode, bool check_finite, str? backend) -> Tensor",
    Options,
    _indices,
    _fake_indices,
    vmap=_over_batch,
)
nearest_code_statistics = Registered(
    "nearest_code_statistics(Tensor x, Tensor codebook, Tensor? mask, str mode, bool deterministic, bool check_finite,"
    " str? backend) -> (Tensor squared_error, Tensor sums, Tensor counts, Tensor indices)",
    StatisticsOptions,
    _statistics,
    _fake_statistics,
    gradient=Gradient(_keep, _gradient),
)


class Transformed(torch.autograd.Function):
    """The registered operation for transforms of torch.func and forward mode, which its own gradient does not serve."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.fastvq.nearest_code_statistics(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, codebook, mask, *_ = inputs
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, inputs[:3], None, output)
        ctx.save_for_forward(x, codebook, mask, output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = (None,) * 3 if grads[0] is None else _gradient(ctx, grads[0])
        return *found, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_codebook: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, codebook, mask, indices = ctx.saved_tensors
        places = indices[..., None].expand(x.shape)
        wide = reference.wide_dtype(x, codebook)
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
        found = Transformed.apply(*tensors, *inputs[3:])
        return tuple(value.unflatten(0, (info.batch_size, -1)) for value in found), 0
