"""Models in evaluation mode for one call, without a trace on the models that others hold."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from fastvq._unwrap import COMPILED

M = TypeVar("M", bound=nn.Module)


def in_evaluation(model: M, *, only: str | None = None) -> M:
    """The model in evaluation mode, as other modules on the same parameters, buffers and hooks.

    ``model.eval()`` switches dropout off for every thread, and back on while another one still needs it off. Modules
    are cheap to copy and their tensors are not, so this copies the modules alone: what is moved or changed in place is
    changed for both, and flags of either are nothing to the other. Modules that a model keeps outside of its registered
    submodules (in a list, say) are the model's own and keep their mode. Of ``torch.compile`` the module inside is
    taken, since what is compiled is bound to it; a TorchScript module is copied whole.

    Args:
        only: name of the one submodule that will run; the others stay the model's own.
    """
    return _view(model, {}, only)


def _view(module: Any, seen: dict[int, Any], only: str | None = None) -> Any:
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module).eval()
    module = module._modules.get(COMPILED, module)
    found = seen.get(id(module))
    if found is not None:
        return found
    found = seen[id(module)] = object.__new__(type(module))
    state = module.__dict__.copy()
    forward = state.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        state["forward"] = MethodType(forward.__func__, found)
    state["_parameters"], state["_buffers"] = module._parameters.copy(), module._buffers.copy()
    state["_modules"] = {
        name: child if child is None or only not in (None, name) else _view(child, seen)
        for name, child in module._modules.items()
    }
    state["training"] = False
    # Bound to the original's method.
    state["_compiled_call_impl"] = None
    found.__dict__ = state
    return found
