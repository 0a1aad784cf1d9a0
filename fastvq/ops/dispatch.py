"""Which backend runs an operation, and why.

For each operation a function lists its backends, best first, each with the reason why it cannot run the given arguments
or None when it can. With ``backend=None`` the first that can run is chosen; a backend asked for by name is used or
refused with its reason, never replaced.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvq import _engine
from fastvq.errors import ArgumentError, UnavailableError

Candidate = tuple[str, str | None]

_LEAST_TRITON = (3, 6)
_WIDEST_VECTOR = 512
# Of the attention kernels, whose blocks hold whole rows; wider ones of float32 do not fit into registers.
_WIDEST_HEAD = 256
_WIDEST_FLOAT32_HEAD = 128
_PLAIN = (Tensor, torch.nn.Parameter)
# Bound once: `runs_directly` is asked by every small operation, and a look-up costs as much as an answer.
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_transformed = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_strided = torch.strided
_transform = torch._C._functorch.TransformType


def runs_directly(*tensors: Tensor, optional: Sequence[Tensor | None] = ()) -> bool:
    """Whether to call a backend gives the same as to call the operation registered for it, at 30 us less a call.

    It does unless something watches or rewrites operations: a compiler or tracer, a transform of torch.func,
    forward-mode derivatives, a mode, or a subclass of Tensor; or unless there is no memory to read, as on ``meta``.
    """
    if (
        _is_compiling()
        or _modes()
        or _function_modes()
        or _is_transformed()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda):
            return False
        if tensor.layout is not _strided or tensor.is_nested:
            return False
    for extra in optional:
        if extra is not None and (type(extra) not in _PLAIN or extra.layout is not _strided or extra.is_nested):
            return False
    return True


def is_batched() -> bool:
    """Whether torch.vmap runs the call on a batch of which it sees one sample."""
    return not _is_compiling() and _is_transformed() and _transform.Vmap in _transforms()


def in_forward_mode() -> bool:
    """Whether derivatives are carried along with values, as torch.func.jvp and torch.autograd.forward_ad do."""
    return not _is_compiling() and (
        forward_ad._current_level >= 0 or (_is_transformed() and _transform.Jvp in _transforms())
    )


def is_differentiated() -> bool:
    """Whether a transform of torch.func or forward mode takes derivatives. Registered operations have none for them:
    their gradients are for autograd alone, and in forward mode they would count as constants.
    """
    return in_forward_mode() or (not _is_compiling() and _is_transformed() and _transform.Grad in _transforms())


def _transforms() -> list[Any]:
    return [one.key() for one in torch._C._functorch.get_interpreter_stack() or ()]


def require_plain(op: str, backend: str | None) -> None:
    """Refuse a backend other than PyTorch's operators, which alone have all derivatives."""
    if backend not in (None, "torch"):
        raise UnavailableError(
            f"backend: {backend!r} was asked for but cannot run {op} here:"
            " transforms of torch.func and forward mode differentiate plain PyTorch"
        )


def select_backend(op: str, candidates: Sequence[Candidate], backend: str | None) -> str:
    """Name of the backend to run.

    Args:
        op: name of the operation, for messages.
        candidates: pairs (name, reason against it or None), best first.
        backend: the user's choice, or None for the first that can run.

    Raises:
        ArgumentError: the operation has no backend of that name.
        UnavailableError: the backend asked for, or every backend, cannot run here.
    """
    if backend is None:
        for name, reason in candidates:
            if reason is None:
                return name
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in candidates)
        raise UnavailableError(f"backend: none can run {op} here: {reasons}")
    for name, reason in candidates:
        if name == backend:
            if reason is not None:
                raise UnavailableError(f"backend: {backend!r} was asked for but cannot run {op} here: {reason}")
            return name
    names = ", ".join(repr(name) for name, _ in candidates)
    raise ArgumentError(f"backend: expected None or one of {names} for {op}, got {backend!r}")


def memory_reason(tensor: Tensor) -> str | None:
    """Why compiled CPU code cannot read the tensor's memory, or None when it can."""
    if tensor.device.type != "cpu":
        return f"it reads CPU memory, the tensor is on {tensor.device}"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        # Fake and functional tensors say "cpu" but have no memory behind them.
        return f"it reads plain tensors, not {type(tensor).__name__}"
    return None


def draw_backends(logits: Tensor) -> list[Candidate]:
    """Backends of `fastvq.ops.draw.draw` for these logits."""
    return [("cpp", memory_reason(logits) or _engine.why_unavailable()), ("torch", None)]


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton kernels cannot be used in this process, or None when they can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install fastvq[gpu])"
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST_TRITON:
        return f"it needs Triton {'.'.join(map(str, _LEAST_TRITON))} or newer, {version} is installed"
    return None


def triton_reason(*tensors: Tensor) -> str | None:
    """Why Triton kernels cannot run on these tensors, or None when they can."""
    # On a CPU they run for tests alone, in the interpreter, which Triton chooses when a kernel is imported.
    if any(t.device.type != "cuda" for t in tensors) and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, the tensor is on {tensors[0].device}"
    if any(t.dtype == torch.float64 for t in tensors):
        return "it computes in float32, and the tensors are float64"
    return why_no_triton()


def nearest_code_backends(x: Tensor, codebook: Tensor) -> list[Candidate]:
    """Backends of `fastvq.ops.nearest_code` and `nearest_code_statistics` for these arguments."""
    width = x.shape[-1]
    wide = f"it takes vectors of up to {_WIDEST_VECTOR} elements, not {width}" if width > _WIDEST_VECTOR else None
    triton: Candidate = ("triton", triton_reason(x, codebook) or wide)
    if x.device.type == "cuda":
        return [triton, ("torch", None)]
    reason = memory_reason(x) or memory_reason(codebook)
    if torch.float64 in (x.dtype, codebook.dtype):
        reason = reason or "it computes in float32, and the tensors are float64"
    if width == 0:
        reason = reason or "the vectors have no elements"
    reason = reason or _engine.why_unavailable()
    return [("cpp", reason), ("torch", None), triton]


def ema_update_backends(
    counts: Tensor, sums: Tensor, cluster_size: Tensor, embedding_sum: Tensor, embedding: Tensor
) -> list[Candidate]:
    """Backends of `fastvq.ops.ema_update` for these arguments."""
    return [("cpp", _why_no_cpp_update(counts, sums, cluster_size, embedding_sum, embedding)), ("torch", None)]


def _why_no_cpp_update(counts: Tensor, *floats: Tensor) -> str | None:
    for tensor in (counts, *floats):
        reason = memory_reason(tensor)
        if reason is not None:
            return reason
    if counts.dtype.is_floating_point and counts.dtype != torch.float32:
        return f"it takes integer or float32 counts, not {counts.dtype}"
    for tensor in floats:
        if tensor.dtype != torch.float32:
            return f"it takes float32, not {tensor.dtype}"
    if not all(buffer.is_contiguous() for buffer in floats[1:]):
        return "it moves contiguous buffers"
    return _engine.why_unavailable()


def causal_conv2d_backends(x: Tensor, weight: Tensor) -> list[Candidate]:
    """Backends of `fastvq.ops.causal_conv2d` and `fused_causal_conv2d` for these arguments."""
    return _kernel_or_library(x, weight)


def select_causal_conv2d(x: Tensor, weight: Tensor, backend: str | None) -> str:
    """Name of the backend of a causal convolution; see `select_backend`."""
    if backend is None and x.is_cpu:
        # Always the first there; to list all of them would cost as much as a small convolution.
        return "torch"
    return select_backend("causal_conv2d", causal_conv2d_backends(x, weight), backend)


def causal_attention_backends(query: Tensor, key: Tensor, value: Tensor) -> list[Candidate]:
    """Backends of `fastvq.ops.causal_attention` for these arguments."""
    widest = max(query.shape[-1], value.shape[-1])
    limit, of_type = (_WIDEST_FLOAT32_HEAD, " of float32") if query.dtype == torch.float32 else (_WIDEST_HEAD, "")
    reason = f"it takes widths{of_type} up to {limit}, not {widest}" if widest > limit else None
    return _kernel_or_library(query, key, value, reason=reason)


def _kernel_or_library(*tensors: Tensor, reason: str | None = None) -> list[Candidate]:
    triton: Candidate = ("triton", triton_reason(*tensors) or reason)
    return [triton, ("torch", None)] if tensors[0].device.type == "cuda" else [("torch", None), triton]


_BACKENDS: dict[str, Callable[..., list[Candidate]]] = {
    "causal_attention": causal_attention_backends,
    "causal_conv2d": causal_conv2d_backends,
    "draw": draw_backends,
    "ema_update": ema_update_backends,
    "nearest_code": nearest_code_backends,
}


def explain_backend(op: str, *args: Any, backend: str | None = None) -> str:
    """One line per backend of an operation: which would run for these arguments, and why the others would not.

    Args:
        op: name of the operation, such as ``"draw"``.
        args: the tensors that decide, as the operation takes them (``draw``: the logits;
            ``nearest_code``: x and the codebook; ``ema_update``: its five tensors; ``causal_conv2d``: x and the
            weight; ``causal_attention``: query, key and value).
        backend: as for the operation itself.

    Raises:
        ArgumentError: there is no such operation, or no such backend.
        UnavailableError: the backend asked for cannot run here.
    """
    if op not in _BACKENDS:
        raise ArgumentError(f"op: expected one of {', '.join(map(repr, _BACKENDS))}, got {op!r}")
    candidates = _BACKENDS[op](*args)
    chosen = select_backend(op, candidates, backend)
    why = "chosen: the first that can run" if backend is None else "chosen: asked for"
    lines = (f"{name}: {why if name == chosen else reason or 'could run, not chosen'}" for name, reason in candidates)
    return "\n".join(lines)
