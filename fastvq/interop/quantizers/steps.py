"""What quantisers of all kinds do: look for codes, measure the error, average. None of it forms distances or one-hot
rows of all vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastvq.ops.dispatch import is_batched, is_differentiated
from fastvq.ops.ema_update import ema_update
from fastvq.ops.nearest_code import CodeStatistics, nearest_code, nearest_code_statistics

_tracing_state = torch._C._get_tracing_state
_PLAIN = (Tensor, torch.nn.Parameter)
# Vectors of a sample from which on a call for each sample is worth it.
_MANY = 1024


def can_run(x: object, *codebooks: Tensor) -> bool:
    """Whether vectors can be looked up by our operations and nothing is watched that has to see PyTorch's own: a
    tracer, an export, a transform of torch.func. In half precision the original rounds distances, which decide.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
    elif _tracing_state() is not None or is_batched() or is_differentiated():
        return False
    if not isinstance(x, Tensor) or type(x) not in _PLAIN or not x.is_floating_point() or x.numel() == 0:
        return False
    if not (x.is_cpu or x.is_cuda) or x.layout is not torch.strided:
        return False
    return all(type(one) in _PLAIN and one.dtype is torch.float32 and one.device == x.device for one in codebooks)


def search(x: Tensor, codebook: Tensor) -> Tensor:
    """int64 [N] of vectors [N, D] and codes [K, D]."""
    return nearest_code(x.detach(), codebook.detach())


def assign(x: Tensor, codebook: Tensor, mask: Tensor | None = None) -> CodeStatistics:
    """Codes of vectors [N, D] or [H, N, D], with counts and sums of those where the mask is; without gradients."""
    with torch.no_grad():
        return nearest_code_statistics(x.detach(), codebook.detach(), mask=mask)


def over_processes(counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Both as floating point, added over all processes if there are several."""
    counts = counts.to(sums.dtype)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    return counts, sums


def move(
    counts: Tensor, sums: Tensor, cluster_size: Tensor, average: Tensor, codes: Tensor, *, decay: float, eps: float
) -> None:
    """`fastvq.ops.ema_update` in the way in which the originals write: behind autograd's back."""
    with torch.no_grad():
        ema_update(counts, sums, cluster_size.data, average.data, codes.data, decay=decay, eps=eps)


# Functions with a ``setup_context`` look at their signature in every call, which costs as much as a small search.
class _Error(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, code: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x, code)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, code = ctx.saved_tensors
        return (x - code).mul_(grads[0] * (2 / x.numel())), None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, code: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return torch.empty_like(x, dtype=code.dtype).copy_(code)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def mean_error(x: Tensor, code: Tensor, total: Tensor) -> Tensor:
    """mean (x - sg[code])^2 of tensors of one shape; ``total`` is their sum, where x is float32."""
    if x.dtype is not torch.float32 or code.dtype is not torch.float32:
        return F.mse_loss(code.detach(), x)
    value: Tensor = _Error.apply(x, code.detach(), total.sum() / x.numel())
    return value


def straight_through(x: Tensor, code: Tensor) -> Tensor:
    """``code`` whose gradient goes to ``x``, in memory of its own and with the strides of ``x``, as the originals' sum
    with ``x`` is: what comes next may change it, while the code is kept for the backward pass.
    """
    if not (x.requires_grad and torch.is_grad_enabled()) and code.stride() == x.stride():
        return code
    out: Tensor = _StraightThrough.apply(x, code.detach())
    return out


def compact(x: Tensor) -> Tensor:
    """Vectors [B, N, D], one after the other in memory; without gradients."""
    x = x.detach()
    if x.is_cpu and x.stride()[1:] == (1, x.shape[1]) and x.shape[1] >= _MANY and not torch.compiler.is_compiling():
        # PyTorch transposes matrices by blocks, and several of them element by element.
        out = torch.empty(x.shape, dtype=x.dtype)
        for mine, theirs in zip(out, x, strict=True):
            mine.copy_(theirs)
        return out
    return x.contiguous()


def look_up(indices: Tensor, codes: Tensor, like: Tensor) -> Tensor:
    """Codes [K, C] of indices [B, ...] as [B, C, ...], with the strides of ``like``; without gradients."""
    codes = codes.detach()
    if not like.is_contiguous():
        found = F.embedding(indices, codes).movedim(-1, 1)
        return found if found.stride() == like.stride() else torch.empty_like(like, dtype=codes.dtype).copy_(found)
    batch, channels = like.shape[:2]
    table = codes.t().contiguous().expand(batch, -1, -1)
    return table.gather(2, indices.view(batch, 1, -1).expand(-1, channels, -1)).view(like.shape)
