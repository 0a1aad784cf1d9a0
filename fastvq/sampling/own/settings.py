"""What a module computes with beside weights and buffers: attributes, hooks, and methods that were replaced on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What is looked at elsewhere, or has no say in logits of evaluation mode.
_SEEN = {"training", "_parameters", "_buffers", "_modules", "_compiled_call_impl", "_fastvq_prior"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Deeper than this nothing is looked into.
_DEEPEST = 4


def settings_of(module: nn.Module) -> tuple[object, ...]:
    """Of a module and all inside it; equal as long as nothing was set anew or, of tensors, changed in place.

    What lies outside of the module, such as a global, is not seen, nor what objects of other classes hold.
    """
    found: list[object] = []
    waiting: list[nn.Module] = [module]
    seen: set[int] = set()
    for part in waiting:
        if id(part) in seen:
            continue
        seen.add(id(part))
        found.append(type(part))
        found += [(name, _of(value, 0)) for name, value in part.__dict__.items() if name not in _SEEN]
        waiting.extend(child for child in part._modules.values() if child is not None)
    return tuple(found)


def _of(value: Any, depth: int) -> object:
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        # The version counter of what inference mode made cannot be read.
        return id(value), 0 if value.is_inference() else value._version
    if depth < _DEEPEST:
        if isinstance(value, dict):
            return tuple((_of(name, depth + 1), _of(one, depth + 1)) for name, one in value.items())
        if isinstance(value, (list, tuple)):
            return type(value), *(_of(one, depth + 1) for one in value)
    return id(value)
