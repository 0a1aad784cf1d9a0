"""Which backend runs an operation, and why.

An operation has a table of backends, each with its own reason why it cannot run given arguments, or None when it can.
With ``backend=None`` the first that can run is chosen; a backend asked for by name is used or refused with its reason,
never replaced. A backend from elsewhere is one more row: ``table.add(Backend("mine", why_not, run), before="torch")``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvq.errors import ArgumentError, UnavailableError

Candidate = tuple[str, str | None]

_LEAST_TRITON = (3, 6)
# Before, its compiler fails on some kernels for the newest GPUs.
_LEAST_TRITON_OF_SM100 = (3, 8)
_PLAIN = (Tensor, torch.nn.Parameter)
# Bound once: `runs_directly` is asked by every small operation, and a look-up costs as much as an answer.
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_transformed = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_strided = torch.strided
_transform = torch._C._functorch.TransformType


def anywhere(*tensors: Tensor) -> None:
    """No reason against: PyTorch's own operators run on whatever it has."""


@dataclass(frozen=True)
class Backend:
    """A row of an operation's table.

    Attributes:
        why_not: of the tensors that decide, as `explain_backend` takes them: why it cannot run, or None.
        run: what the operation calls; the operation's own `backends` module says how.
        gpu: comes before all others for tensors on a GPU, and after them elsewhere.
        refuses: of the operation's options, by name: why it cannot run with them, or None.
    """

    name: str
    why_not: Callable[..., str | None]
    run: Any
    gpu: bool = False
    refuses: Callable[..., str | None] | None = None

    def reason(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> str | None:
        """Why it cannot run, or None."""
        return self.why_not(*tensors) or (self.refuses(**options) if self.refuses is not None else None)


class Backends:
    """The table of an operation, best first.

    ``prefer`` says of the tensors that decide and of options by name, for tensors on a GPU, which row comes first, and
    why.
    """

    def __init__(
        self, operation: str, rows: Sequence[Backend], prefer: Callable[..., tuple[str, str]] | None = None
    ) -> None:
        self.operation, self.prefer = operation, prefer
        self.replace(rows)

    def replace(self, rows: Sequence[Backend]) -> None:
        """Another table, best first."""
        self.rows = tuple(rows)
        self._on_gpu = tuple(sorted(rows, key=lambda row: not row.gpu))
        self._elsewhere = tuple(sorted(rows, key=lambda row: row.gpu))

    def add(self, row: Backend, *, before: str | None = None) -> None:
        """Another row, at the end or before the one of that name.

        Raises:
            ArgumentError: there is a row of its name, or none of the other.
        """
        names = [known.name for known in self.rows]
        if row.name in names:
            raise ArgumentError(f"backend: {self.operation} has one named {row.name!r} already")
        if before is not None and before not in names:
            raise ArgumentError(f"before: expected one of {', '.join(map(repr, names))}, got {before!r}")
        place = len(names) if before is None else names.index(before)
        self.replace([*self.rows[:place], row, *self.rows[place:]])

    def preference(self, *tensors: Tensor, **options: Any) -> tuple[str, str] | None:
        """Name of the row that comes first for these arguments, and why; None where the table's order holds."""
        return self.prefer(*tensors, **options) if self.prefer is not None and tensors[0].is_cuda else None

    def ordered(self, *tensors: Tensor, **options: Any) -> Sequence[Backend]:
        """The rows, best first, for these arguments."""
        rows = self._on_gpu if tensors[0].is_cuda else self._elsewhere
        preference = self.preference(*tensors, **options)
        return rows if preference is None else sorted(rows, key=lambda row: row.name != preference[0])

    def candidates(self, *tensors: Tensor, **options: Any) -> list[Candidate]:
        """Name of every backend with the reason against it or None, best first."""
        return [(row.name, row.reason(tensors, options)) for row in self.ordered(*tensors, **options)]

    def select(self, backend: str | None, *tensors: Tensor, **options: Any) -> Backend:
        """The backend to run; errors are those of `select_backend`."""
        for row in self.ordered(*tensors, **options) if backend is None else self.rows:
            if backend in (None, row.name) and row.reason(tensors, options) is None:
                return row
        name = select_backend(self.operation, self.candidates(*tensors, **options), backend)
        return next(row for row in self.rows if row.name == name)


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


@functools.cache
def _triton_version() -> tuple[int, ...] | None:
    """Major and minor version, or None where it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton kernels cannot be used in this process, or None when they can."""
    version = _triton_version()
    if version is None:
        return "Triton is not installed (pip install fastvq[gpu])"
    return None if version >= _LEAST_TRITON else _too_old(_LEAST_TRITON, version)


def sm100_reason(tensor: Tensor) -> str | None:
    """Why a kernel that older versions of Triton do not compile for compute capability 10.0 cannot run, or None."""
    version = _triton_version() or ()
    if not tensor.is_cuda or version >= _LEAST_TRITON_OF_SM100:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    too_old = _too_old(_LEAST_TRITON_OF_SM100, version)
    return f"{too_old}, for compute capability {major}.{minor}" if major >= 10 else None


def _too_old(least: tuple[int, ...], version: tuple[int, ...]) -> str:
    needed, found = (".".join(map(str, number)) for number in (least, version))
    return f"it needs Triton {needed} or newer, {found} is installed"


def triton_reason(*tensors: Tensor) -> str | None:
    """Why Triton kernels cannot run on these tensors, or None when they can."""
    # On a CPU they run for tests alone, in the interpreter, which Triton chooses when a kernel is imported.
    if any(t.device.type != "cuda" for t in tensors) and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, the tensor is on {tensors[0].device}"
    if any(t.dtype == torch.float64 for t in tensors):
        return "it computes in float32, and the tensors are float64"
    return why_no_triton()
