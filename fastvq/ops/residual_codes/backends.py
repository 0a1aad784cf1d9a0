"""The backends of residual codes, and the operations registered for them, for x [N, D] and codebooks [Q, K, D].

What a row runs has ``codes`` and ``statistics``, see `fastvq.ops.residual_codes.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.ops._registered import Gradient, Registered
from fastvq.ops.dispatch import Backend, Backends, anywhere
from fastvq.ops.nearest_code.reference import wide_dtype
from fastvq.ops.residual_codes import cpp, reference, triton
from fastvq.ops.residual_codes.options import Codes, Options, Statistics, StatisticsOptions

BACKENDS = Backends(
    "residual_codes",
    [
        Backend("cpp", cpp.why_not, cpp),
        Backend("levels", anywhere, reference.InTurn()),
        Backend("torch", anywhere, reference.Reference()),
        Backend("triton", triton.why_not, triton, gpu=True),
    ],
)


def _codes(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: Options) -> Codes:
    found: Codes = BACKENDS.select(options.backend, x, codebooks).run.codes(x, codebooks, depths, options)
    return found


def _statistics(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: StatisticsOptions) -> Statistics:
    found: Statistics = BACKENDS.select(options.backend, x, codebooks).run.statistics(x, codebooks, depths, options)
    return found


def _fake_codes(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: Any) -> Codes:
    return (
        x.new_empty(x.shape, dtype=reference.residual_dtype(x)),
        x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64),
    )


def _fake_statistics(x: Tensor, codebooks: Tensor, depths: Tensor | None, options: StatisticsOptions) -> Statistics:
    dtype = wide_dtype(x, codebooks)
    return (
        x.new_empty(codebooks.shape[:1], dtype=dtype),
        x.new_empty(codebooks.shape, dtype=dtype),
        x.new_empty(codebooks.shape[:2], dtype=torch.int64),
        *_fake_codes(x, codebooks, depths, options),
    )


def _keep(ctx: Any, tensors: tuple[Any, ...], options: Any, outputs: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*tensors[:2], outputs[4])


def _gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """squared_errors[q] = sum of |r_{q+1}|^2 over the vectors of the level; where codes change it has no derivative."""
    x, codebooks, indices = ctx.saved_tensors
    residual = x.to(reference.residual_dtype(x))
    total = torch.zeros(x.shape, dtype=upstream.dtype, device=x.device)
    for level, codebook in enumerate(codebooks):
        absent = (indices[:, level] < 0)[:, None]
        code = codebook[indices[:, level].clamp(min=0)].to(residual.dtype)
        residual = torch.where(absent, residual, residual - code)
        total = total + torch.where(absent, 0, residual.to(upstream.dtype) * (2 * upstream[level]))
    return total.to(x.dtype), None, None


residual_codes = Registered(
    "residual_codes(Tensor x, Tensor codebooks, Tensor? depths, str mode, str? backend)"
    " -> (Tensor quantized, Tensor indices)",
    Options,
    _codes,
    _fake_codes,
)
residual_codes_statistics = Registered(
    "residual_codes_statistics(Tensor x, Tensor codebooks, Tensor? depths, str mode, bool deterministic, str? backend)"
    " -> (Tensor squared_errors, Tensor sums, Tensor counts, Tensor quantized, Tensor indices)",
    StatisticsOptions,
    _statistics,
    _fake_statistics,
    gradient=Gradient(_keep, _gradient),
)
