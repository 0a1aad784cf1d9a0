"""Modules and stored tensors: built without memory, compared by name and shape, filled in the types stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)


class _NoRandomValues(TorchFunctionMode):
    """Leaves initial values out. On the meta device there are none, but the first ones would import for seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def outline(make: Callable[[], M]) -> M:
    """The module that ``make`` builds, on the meta device: names, shapes and structure at no memory."""
    with torch.device("meta"), _NoRandomValues():
        return make()


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make tensors the parameters and buffers of an outline, whose names and shapes they must have.

    Floating-point tensors keep their types, whatever the default type is. Where only one of the two is of such a type,
    as with flags that files of another version hold in another type, the module's kind of type decides.
    """
    own = module.state_dict()
    module.load_state_dict({name: _kept(tensor, own[name]) for name, tensor in tensors.items()}, assign=True)


@torch.no_grad()
def load_in_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The same for a module that lives already: its tensors change value and type, and stay the same objects.

    Floating-point buffers that no state dict holds become float32.

    Raises:
        RuntimeError: names or shapes that do not fit.
    """
    own = module.state_dict(keep_vars=True)
    for name, mine in [*module.named_parameters(), *module.named_buffers()]:
        if not mine.is_floating_point():
            continue
        stored = tensors.get(name) if name in own else None
        dtype = torch.float32 if stored is None or not stored.is_floating_point() else stored.dtype
        if mine.dtype != dtype:
            mine.data = mine.data.to(dtype)
    module.load_state_dict(tensors)


def _kept(stored: Tensor, declared: Tensor) -> Tensor:
    if not declared.is_floating_point():
        return stored.to(declared.dtype)
    return stored if stored.is_floating_point() else stored.float()


def differences(expected: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What does not fit between a state dict and the names and shapes of stored tensors; empty if all does."""
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    found = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
    return found + [
        f"{name} has shape {list(shapes[name])}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name])
    ]
