"""Live modules of other projects, converted once for as long as they stay as they are."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvq._unwrap import unwrap
from fastvq._watch import first_elements, gather, unchanged
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.interop.layout import Options, build, require_kind
from fastvq.interop.state import normalise
from fastvq.models import VQVAE2, PixelSNAIL

_SAMPLES = 16


@dataclass(frozen=True)
class _Marks:
    """What changes when a module does: addresses and versions of tensors, settings of activations."""

    addresses: list[int]
    versions: list[int]
    settings: list[bool]


@dataclass(frozen=True)
class _Entry:
    """A conversion and what it was made from.

    ``views`` are some elements of each tensor, by which changes that leave no other trace are noticed. They also keep
    the memory alive, so that an address among the marks cannot come to belong to another tensor.
    """

    marks: _Marks
    views: list[Tensor]
    seen: list[Tensor]
    legacy: bool | None
    model: PixelSNAIL | VQVAE2


_cache: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def convert(module: nn.Module, *, legacy: bool | None = None) -> PixelSNAIL | VQVAE2:
    """Our model with the present weights of a live module, which is recognised by its state dict.

    Args:
        module: a VQVAE or PixelSNAIL of a known layout, also inside DataParallel, DistributedDataParallel,
            AveragedModel or torch.compile.
        legacy: whether the activations at the start of its residual blocks work in place. None looks at the modules: if
            they are of type ``nn.ELU`` or ``nn.ReLU`` and in place, it is a legacy model.

    Returns:
        The model in float32, on the module's device, in evaluation mode. Weights are copied. It is kept, and returned
        again while the module lives and has not changed, so copy it before changing it.

    Raises:
        ArgumentError, ArgumentTypeError: not a module, not one of the known layouts, or one that is changed in a way
            that ours does not have.

    A change is noticed if it is an in-place operation (an optimiser's step, ``load_state_dict``), replaces a tensor or
    a module, or moves the module. Operations on ``tensor.data`` leave no trace; they are noticed by comparing up to 16
    of the first elements of every tensor, so that one that changes only others is not. Attributes of modules other than
    ``inplace``, such as the number of heads, are read at the first conversion only.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    module = unwrap(module)
    if legacy is not None and not isinstance(legacy, bool):
        raise ArgumentTypeError(f"legacy: expected True, False or None, got {legacy!r}")
    with _lock, torch.no_grad():
        entry = _cache.get(module)
        tensors, settings = _contents(module)
        marks = _marks(tensors, settings)
        if entry is not None and entry.legacy == legacy and entry.marks == marks and unchanged(entry.views, entry.seen):
            return entry.model
        # The marks were taken first: what is changed by another thread meanwhile is noticed the next time.
        views = [_view(tensor) for tensor in tensors]
        seen = gather(views)
        try:
            model = _convert(module, legacy)
        except ArgumentError as error:
            # What reads state dicts names the argument of load.
            raise ArgumentError(str(error).replace("source:", "module:", 1)) from error
        _cache[module] = _Entry(marks, views, seen, legacy, model)
        return model


def _convert(module: nn.Module, legacy: bool | None) -> PixelSNAIL | VQVAE2:
    tensors = normalise(module.state_dict())
    kind = require_kind(tensors)
    options = Options(
        legacy=_works_in_place(module, kind) if legacy is None else legacy,
        heads=_heads(module),
        dropout=_dropout(module),
        decay=_decay(module),
    )
    return build(tensors, kind, options).to(next(iter(tensors.values())).device)


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


def _contents(module: nn.Module) -> tuple[list[Tensor], list[bool]]:
    """Parameters and buffers, and which activations work in place.

    nn.Module's own iterators would take longer than everything else that is done for a conversion at hand.
    """
    tensors: list[Tensor | None] = []
    settings: list[bool] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            tensors.extend(part._parameters.values())
            tensors.extend(part._buffers.values())
            waiting.extend(part._modules.values())
            if "inplace" in part.__dict__:
                settings.append(bool(part.__dict__["inplace"]))
    return [tensor for tensor in tensors if tensor is not None], settings


def _marks(tensors: list[Tensor], settings: list[bool]) -> _Marks:
    # Tensors made in inference mode have no version; their elements are compared like those of all others.
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    return _Marks([tensor.data_ptr() for tensor in tensors], versions, settings)


def _view(tensor: Tensor) -> Tensor:
    """The first elements of a tensor."""
    count = _SAMPLES
    if tensor.ndim == 4 and tensor.shape[2] > 1:
        # Causal kernels zero masked entries of their last row in every pass, which changes nothing: stay above it.
        count = min(count, (tensor.shape[2] - 1) * tensor.shape[3])
    return first_elements(tensor, count)
