"""The backends of causal attention, and the operations registered for it.

What a row runs is a module with ``forward`` and ``backward``, see `fastvq.ops.causal_attention.blocks`; but ``sdpa``
runs in front of the registered operation: it is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.ops._registered import ALL_DEVICES, Gradient, Registered, refusing
from fastvq.ops.causal_attention import blocks, library, triton
from fastvq.ops.causal_attention.options import Gradients, Options
from fastvq.ops.dispatch import Backend, Backends, anywhere, runs_directly

BACKENDS = Backends(
    "causal_attention",
    [
        Backend("torch", anywhere, blocks),
        Backend("sdpa", library.why_not, library, gpu=True, refuses=library.refuses),
        Backend("triton", triton.why_not, triton, gpu=True),
    ],
)


def runs_on_library(query: Tensor, key: Tensor, value: Tensor, dropout: float, backend: str | None) -> bool:
    """Whether PyTorch's own operator runs, in front of the registered operation.

    On a GPU it comes first: its flash kernels multiply at tensor rate, where ours were measured at 9 % of it.

    Raises:
        ArgumentError, UnavailableError: ``sdpa`` was asked for and cannot run.
    """
    given = query, key, value
    if backend == "sdpa":
        return BACKENDS.select(backend, *given, dropout=dropout).name == backend
    if backend is None and query.is_cuda:
        # Not the whole table: compilers follow this.
        first = BACKENDS.ordered(query)[0]
        return first.name == "sdpa" and first.reason(given, {"dropout": dropout}) is None
    serves = not dropout and query.shape[2] > 1 and (not query.is_cpu or query.shape[3] == value.shape[3])
    return serves and backend in (None, "torch")


def _forward(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    chosen = BACKENDS.select(options.backend, query, key, value, dropout=options.dropout, lse=True)
    found: tuple[Tensor, Tensor] = chosen.run.forward(query, key, value, seed, options)
    return found


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Gradients:
    options: Options = rest[-1]
    chosen = BACKENDS.select(options.backend, query, key, value, dropout=options.dropout, lse=True)
    found: Gradients = chosen.run.backward(grad, query, key, value, *rest)
    return found


def _fake(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), query.new_empty(query.shape[:3], dtype=blocks.wide_dtype(query))


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Gradients:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, tensors: tuple[Any, ...], options: Options, outputs: tuple[Any, ...]) -> None:
    query, key, value, seed = tensors
    ctx.save_for_backward(query, key, value, *outputs, seed)
    ctx.options = options


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, seed = ctx.saved_tensors
    # Nobody will ask for the gradient of this gradient where none is recorded.
    direct = not torch.is_grad_enabled() and runs_directly(grad, query, key, value)
    found = causal_attention_backward(grad, query, key, value, out, lse, seed, options=ctx.options, direct=direct)
    return *found, None


def _flops(query: torch.Size, key: torch.Size, value: torch.Size, seed: Any, options: Options) -> int:
    """Of the pairs that the mask leaves."""
    return 2 * _pairs(query, options) * (query[3] + value[3])


def _backward_flops(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any) -> int:
    """Logits and slopes once more, then three gradients."""
    return 2 * _pairs(query, rest[-1]) * (3 * query[3] + 2 * value[3])


def _pairs(query: torch.Size, options: Options) -> int:
    batch, heads, length, _ = query
    return batch * heads * (length * (length - 1 if options.mask == "strict" else length + 1) // 2)


_NO_SECOND = (
    "causal_attention: the gradient cannot be differentiated again; use causal_attention_reference, plain PyTorch"
)
no_second_gradient = refusing(_NO_SECOND)
causal_attention = Registered(
    "causal_attention(Tensor query, Tensor key, Tensor value, Tensor? seed, str mask, float dropout, str? backend)"
    " -> (Tensor out, Tensor lse)",
    Options,
    _forward,
    _fake,
    devices=ALL_DEVICES,
    gradient=Gradient(_keep, _gradient),
    flops=_flops,
)
causal_attention_backward = Registered(
    "causal_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor? seed, str mask, float dropout, str? backend) -> (Tensor of_query, Tensor of_key, Tensor of_value)",
    Options,
    _backward,
    _fake_backward,
    devices=ALL_DEVICES,
    gradient=_NO_SECOND,
    flops=_backward_flops,
)
