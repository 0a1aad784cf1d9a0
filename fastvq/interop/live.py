"""Live modules of other projects, converted once for as long as they stay as they are."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import nn

from fastvq._check import require_bool
from fastvq._unwrap import unwrap
from fastvq._watch import Snapshot, contents_of
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.interop.layout import Converted, Options, build, require_grid, require_kind
from fastvq.interop.state import normalise


@dataclass(frozen=True)
class _Entry:
    """A conversion and what it was made from: weights, which activations work in place, the arguments."""

    weights: Snapshot
    settings: list[bool]
    arguments: tuple[bool | None, tuple[int, int] | None]
    model: Converted

    def made_with(self, settings: list[bool], legacy: bool | None, shape: tuple[int, int] | None) -> bool:
        return self.settings == settings and self.arguments == (legacy, shape)


_cache: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def convert(module: nn.Module, *, legacy: bool | None = None, shape: tuple[int, int] | None = None) -> Converted:
    """Our model with the present weights of a live module, which is recognised by its state dict.

    Args:
        module: a VQVAE, PixelSNAIL or PixelCNN of a known layout, also inside DataParallel,
            DistributedDataParallel, AveragedModel or torch.compile.
        legacy: whether the activations at the start of its residual blocks work in place. None looks at the modules: if
            they are of type ``nn.ELU`` or ``nn.ReLU`` and in place, it is a legacy model.
        shape: grid (H, W) of a PixelCNN, which does not know its own.

    Returns:
        The model in float32, on the module's device, in evaluation mode. Weights are copied. It is kept, and returned
        again while the module lives and has not changed, so copy it before changing it.

    Raises:
        ArgumentError, ArgumentTypeError: not a module, not one of the known layouts, or one that is changed in a way
            that ours does not have.

    Every change of a parameter or buffer is noticed, also one through ``tensor.data`` or NumPy, and so is a tensor or a
    module that is replaced, or a module that is moved. Attributes of modules other than ``inplace``, such as the number
    of heads, are read again with such a change only.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    module = unwrap(module)
    require_bool("legacy", legacy, optional=True)
    shape = None if shape is None else require_grid(shape)
    with torch.no_grad():
        modules, tensors = contents_of(module)
        settings = [bool(part.__dict__["inplace"]) for part in modules if "inplace" in part.__dict__]
        entry = _cache.get(module)
        # Reading all weights takes a while, in which other threads need not wait.
        if entry is not None and entry.made_with(settings, legacy, shape) and entry.weights.matches(tensors):
            return entry.model
        with _lock:
            # The snapshot is older than the model: what is changed between the two is noticed the next time.
            weights = Snapshot(tensors)
            model = _convert(module, legacy, shape)
            entry = _cache.get(module)
            # Causal kernels zero masked entries in every pass, and another thread may have been here first.
            if entry is not None and entry.made_with(settings, legacy, shape) and _same(model, entry.model):
                model = entry.model
            _cache[module] = _Entry(weights, settings, (legacy, shape), model)
            return model


def _same(one: Converted, other: Converted) -> bool:
    """Whether two models have the same settings, and the same weights in the same place."""
    if one.config != other.config:
        return False
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _convert(module: nn.Module, legacy: bool | None, shape: tuple[int, int] | None) -> Converted:
    try:
        tensors = normalise(module.state_dict())
        kind = require_kind(tensors)
        options = Options(
            legacy=_works_in_place(module, kind) if legacy is None else legacy,
            shape=shape,
            heads=_heads(module),
            dropout=_dropout(module),
            decay=_decay(module),
        )
        return build(tensors, kind, options).to(next(iter(tensors.values())).device)
    except ArgumentError as error:
        # What reads state dicts names the argument of load.
        raise ArgumentError(str(error).replace("source:", "module:", 1)) from error


def _works_in_place(module: nn.Module, kind: str) -> bool:
    """Whether the first activation of every residual block overwrites its input."""
    found: set[bool] = set()
    for block in module.modules():
        parts = dict(block.named_children())
        if kind == "vqvae":
            parts = dict(parts["conv"].named_children()) if "conv" in parts else {}
        elif not {"conv1", "conv2"} <= set(parts):
            parts = {}
        first = next((part for part in parts.values() if isinstance(part, (nn.ELU, nn.ReLU))), None)
        if first is not None:
            found.add(first.inplace)
    if len(found) > 1:
        raise ArgumentError("module: some of its residual blocks work in place and others do not; ours all do or none")
    return found == {True}


def _heads(module: nn.Module) -> int:
    blocks = [m for name, m in module.named_modules() if name.endswith(".causal_attention")]
    found = [getattr(block, "n_head", None) for block in blocks]
    if not found:
        return Options.heads
    if not isinstance(found[0], int) or any(count != found[0] for count in found):
        raise ArgumentError(
            f"module: expected an attribute n_head, the same in all attention blocks, got {found}; "
            "fastvq.interop.load takes its state dict and the number of heads"
        )
    return found[0]


def _dropout(module: nn.Module) -> float | None:
    return next((m.p for name, m in module.named_modules() if isinstance(m, nn.Dropout) and "resblocks" in name), None)


def _decay(module: nn.Module) -> float | None:
    decay = getattr(module._modules.get("quantize_t"), "decay", None)
    return decay if isinstance(decay, float) else None
