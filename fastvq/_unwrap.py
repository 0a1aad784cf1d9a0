"""What PyTorch wraps around a module, taken off."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastvq.errors import ArgumentTypeError

T = TypeVar("T")

# The name of the one module inside, which is also what stands before every name of a state dict.
_INSIDE = {nn.DataParallel: "module", DistributedDataParallel: "module", AveragedModel: "module"}
# torch.compile's class is not imported: that takes a second, and what it wraps lies under a name of its own.
COMPILED = "_orig_mod"
# AveragedModel counts its updates in a buffer of this name.
AVERAGED = "n_averaged"
WRAPPERS = tuple(f"{name}." for name in dict.fromkeys([*_INSIDE.values(), COMPILED]))


def unwrap(module: Any) -> Any:
    """The module inside torch.compile, DataParallel, DistributedDataParallel or AveragedModel, however they are nested.

    Anything else comes back as it is.
    """
    while isinstance(module, nn.Module):
        name = next((name for cls, name in _INSIDE.items() if isinstance(module, cls)), COMPILED)
        # Those of TorchScript are no dictionary.
        if name not in module._modules or module._modules[name] is None:
            break
        module = module._modules[name]
    return module


def require_model(name: str, value: object, cls: type[T]) -> T:
    """The model of a class, also inside what :func:`unwrap` takes off.

    Raises:
        ArgumentTypeError: something else.
    """
    inner = unwrap(value)
    if not isinstance(inner, cls):
        raise ArgumentTypeError(f"{name}: expected a {cls.__name__}, got {type(value).__name__}")
    return inner
