"""Causal attention over the positions of a grid in raster order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvq._check import FLOATING_DTYPES, require_choice, require_floating, require_shape, require_tensor
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops import causal_attention_backends as backends
from fastvq.ops.causal_grid import MASKS, Mask
from fastvq.ops.causal_reference import causal_attention_reference
from fastvq.ops.dispatch import in_forward_mode, is_differentiated, require_plain, runs_directly

_LARGEST_SEED = 2**63 - 1


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask = "strict",
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention over positions in raster order.

    Args:
        query, key: [B, heads, N, D]; value: [B, heads, N, E]; floating point.
        mask: ``strict`` lets position i attend to positions before i, and position 0 gets zeros; ``inclusive`` lets it
            attend to itself too.
        dropout: probability in [0, 1) of setting a logit to 0 (Razavi et al. 2019, section 3.2); the others are scaled
            by 1 / (1 - dropout). 0 when not training.
        seed: of the dropout, in 0..2^63 - 1. The same seed drops the same logits for the same shape, device and
            backend. None draws a seed from PyTorch's default generator of the CPU.
        backend: None for the first that can run, ``"triton"`` (GPU) or ``"torch"``; see `fastvq.ops.explain_backend`.

    Returns:
        [B, heads, N, E], of the inputs' dtype (that of autocast where it is on); logits are scaled by 1 / sqrt(D).

    Memory grows with N, not N^2. What a position gets does not depend on later positions as long as their entries are
    finite; a value of NaN may spoil earlier positions, with ``triton`` only gradients. The gradient has no gradient:
    differentiating twice raises, except through `causal_attention_reference`, which is also what forward mode takes
    and, where PyTorch's own attention does not serve, torch.func: with all N^2 logits, and without dropout.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, dtypes, devices or numbers that do not fit.
        UnavailableError: the backend asked for cannot run here.
    """
    direct = runs_directly(query, key, value)
    if not (direct and _fits(query, key, value, mask, dropout, seed)):
        _check(query, key, value, mask, dropout, seed)
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not direct and in_forward_mode():
        return _plain_attention(query, key, value, mask, dropout, backend)
    # On a GPU without Triton the registered operation would do too, but the library's is faster.
    on_library = backend == "torch" or (backend is None and device != "cuda")
    if on_library and not dropout and (device != "cpu" or query.shape[3] == value.shape[3]) and query.shape[2] > 1:
        if direct and learns:
            query, key, value = _Once.apply(query, key, value)
        return backends.library_attention(query, key, value, mask)
    if not direct and is_differentiated():
        return _plain_attention(query, key, value, mask, dropout, backend)
    number = None
    if dropout:
        # A tensor, so that a compiled graph draws a seed of its own in every run.
        number = torch.randint(_LARGEST_SEED, ()) if seed is None else torch.tensor(seed)
    arguments = (query, key, value, number, mask, dropout, backend)
    if not direct:
        return torch.ops.fastvq.causal_attention(*arguments)[0]
    return _Direct.apply(*arguments) if learns else backends.forward(*arguments)[0]


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, backend: str | None
) -> Tensor:
    """For transforms of torch.func and forward mode."""
    require_plain("causal_attention", backend)
    if dropout:
        raise UnavailableError(
            "dropout: expected 0 where transforms of torch.func or forward mode take derivatives, got "
            f"{dropout}; call eval() on the model"
        )
    return causal_attention_reference(query, key, value, mask=mask)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: str, dropout: float, seed: int | None) -> bool:
    """Whether arguments are beyond doubt what `_check` expects, which takes ten times as long to say so."""
    shape, dtype, device = query.shape, query.dtype, query.device
    return (
        mask in MASKS
        and type(dropout) is float
        and 0 <= dropout < 1
        and seed is None
        and len(shape) == len(value.shape) == 4
        and key.shape == shape
        and value.shape[:3] == shape[:3]
        and dtype in FLOATING_DTYPES
        and dtype == key.dtype == value.dtype
        and device == key.device == value.device
    )


def _check(query: object, key: object, value: object, mask: str, dropout: float, seed: int | None) -> None:
    require_choice("mask", mask, MASKS)
    query, key, value = require_tensor("query", query), require_tensor("key", key), require_tensor("value", value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_floating(name, tensor)
    require_shape("query", query, ["B", "heads", "N", "D"])
    require_shape("key", key, query.shape)
    require_shape("value", value, [*query.shape[:3], "E"])
    cast = torch.is_autocast_enabled(query.device.type)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device != query.device:
            raise ArgumentError(f"{name}: expected device {query.device} as for query, got {tensor.device}")
        if tensor.dtype != query.dtype and not cast:
            raise ArgumentTypeError(f"{name}: expected {query.dtype} as for query, got {tensor.dtype}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise ArgumentTypeError(f"dropout: expected a number, got {type(dropout).__name__} {dropout!r}")
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentTypeError(f"seed: expected an int or None, got {type(seed).__name__} {seed!r}")
        if not 0 <= seed <= _LARGEST_SEED:
            raise ArgumentError(f"seed: expected 0..2^63 - 1, got {seed}")


# Registered by hand: torch.library.custom_op costs ten times as much per call.
_library = torch.library.Library("fastvq", "FRAGMENT")
_library.define(
    "causal_attention(Tensor query, Tensor key, Tensor value, Tensor? seed, str mask, float dropout, str? backend)"
    " -> (Tensor out, Tensor lse)"
)
_library.define(
    "causal_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor? seed, str mask, float dropout, str? backend) -> (Tensor of_query, Tensor of_key, Tensor of_value)"
)
for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("causal_attention", backends.forward, _device)
    _library.impl("causal_attention_backward", backends.backward, _device)


@torch.library.register_fake("fastvq::causal_attention", lib=_library)
def _(
    query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, mask: str, dropout: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), query.new_empty(query.shape[:3], dtype=backends.wide_dtype(query))


@torch.library.register_fake("fastvq::causal_attention_backward", lib=_library)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    mask: str,
    dropout: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, inputs, *output)


def _keep(ctx: Any, inputs: tuple, out: Tensor, lse: Tensor) -> None:
    query, key, value, seed, mask, dropout, backend = inputs
    ctx.save_for_backward(query, key, value, out, lse, seed)
    ctx.options = mask, dropout, backend


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    query, key, value, out, lse, seed = ctx.saved_tensors
    # Nobody will ask for the gradient of this gradient where none is recorded.
    direct = not torch.is_grad_enabled() and runs_directly(grad, query, key, value)
    backward = backends.backward if direct else torch.ops.fastvq.causal_attention_backward
    found = backward(grad, query, key, value, out, lse, seed, *ctx.options)
    return *found, None, None, None, None


class _Direct(torch.autograd.Function):
    """The operation as it is registered below, for callers that have no need of the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, lse = backends.forward(*inputs)
        _keep(ctx, inputs, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward(ctx, grad, None)


class _Once(torch.autograd.Function):
    """Its arguments, whose gradients refuse to be differentiated by the name of the operation that they are given to.

    PyTorch's operator refuses too on most devices, naming a function of its own.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Refusing.apply(*grads) if torch.is_grad_enabled() else grads


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _no_second_gradient(ctx, *grads)


@register_flop_formula(torch.ops.fastvq.causal_attention)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, seed: Any, mask: str, *_: Any, **__: Any) -> int:
    """Of the pairs that the mask leaves, for torch.utils.flop_counter."""
    batch, heads, length, width = query
    pairs = length * (length - 1 if mask == "strict" else length + 1) // 2
    return 2 * batch * heads * pairs * (width + value[3])


@register_flop_formula(torch.ops.fastvq.causal_attention_backward)
def _backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **__: Any
) -> int:
    """Logits and slopes once more, then three gradients."""
    batch, heads, length, width = query
    pairs = length * (length - 1 if rest[3] == "strict" else length + 1) // 2
    return 2 * batch * heads * pairs * (3 * width + 2 * value[3])


def _no_second_gradient(ctx: Any, *grads: Tensor | None) -> Any:
    raise UnavailableError(
        "causal_attention: the gradient cannot be differentiated again; use causal_attention_reference, plain PyTorch"
    )


torch.library.register_autograd("fastvq::causal_attention", _backward, setup_context=_keep_for_backward, lib=_library)
torch.library.register_autograd("fastvq::causal_attention_backward", _no_second_gradient, lib=_library)
