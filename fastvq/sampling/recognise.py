"""Whether a prior still computes what a plan of it would compute."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from fastvq.models.blocks import CausalConv2d, CodeConv2d, GatedBlock, PointwiseConv2d
from fastvq.models.pixelcnn import GatedLayer, GatedPixelCNN
from fastvq.models.pixelsnail import AttentionBlock, PixelBlock, PixelSNAIL
from fastvq.models.prior import Prior

# Where a class has them they take part in its computation, beside its parts.
_METHODS = (
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "__getattr__",
    "__getattribute__",
    "forward",
    "logits",
    "context",
    "check_codes",
    "check_condition",
    "check_label",
    "_split",
)
# What nn.Conv2d must be set to; the kernel's size is read off its weights.
_PLAIN = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0), "padding_mode": "zeros"}
_settings = operator.itemgetter(*_PLAIN)
_PLAIN_VALUES = tuple(_PLAIN.values())


class _Part(NamedTuple):
    """A submodule that a plan reads: of one of these classes, or a list of them, or absent."""

    classes: tuple[type[nn.Module], ...]
    many: bool = False
    optional: bool = False


_CONV = _Part((nn.Conv2d,))
_POINTWISE = _Part((PointwiseConv2d,))
_CODES = _Part((CodeConv2d,))
_GATED = _Part((GatedBlock,))
_GATED_LIST = _Part((GatedBlock,), many=True)
_MAYBE_CONV = _Part((nn.Conv2d,), optional=True)
_EITHER = _Part((PointwiseConv2d, CausalConv2d))

# What a plan reads of each class. The context encoder is not among it: every engine runs it as it is.
_PARTS: dict[type[nn.Module], dict[str, _Part]] = {
    PixelSNAIL: {
        "input": _CODES,
        "blocks": _Part((PixelBlock,), many=True),
        "output_blocks": _GATED_LIST,
        "output": _CONV,
    },
    PixelBlock: {
        "layers": _GATED_LIST,
        "attention": _Part((AttentionBlock,), optional=True),
        "mix": _Part((PointwiseConv2d,), optional=True),
    },
    AttentionBlock: {
        "key_block": _GATED,
        "query_block": _GATED,
        "query": _POINTWISE,
        "key": _POINTWISE,
        "value": _POINTWISE,
        "out_block": _GATED,
    },
    GatedBlock: {"conv1": _EITHER, "conv2": _EITHER, "aux": _MAYBE_CONV, "context": _MAYBE_CONV},
    GatedPixelCNN: {
        "input_vertical": _CODES,
        "input_horizontal": _CODES,
        "input_link": _CONV,
        "input_merge": _CONV,
        "input_context": _MAYBE_CONV,
        "layers": _Part((GatedLayer,), many=True),
        "hidden": _CONV,
        "output": _CONV,
    },
    GatedLayer: {"vertical": _CONV, "horizontal": _CONV, "link": _CONV, "merge": _CONV, "context": _MAYBE_CONV},
    CodeConv2d: {},
    CausalConv2d: {},
    PointwiseConv2d: {},
    nn.Conv2d: {},
}
PLANNED = (PixelSNAIL, GatedPixelCNN)


def why_no_plan(prior: Prior) -> str | None:
    """Why a prior cannot be compiled, or None.

    A plan is made from weights, so whatever else has a say in the logits excludes it: methods overridden by a subclass
    or on an object, layers of other classes, hooks, and parametrisations other than weight norm.
    """
    if not isinstance(prior, PLANNED):
        return f"no plan is known for a {type(prior).__name__}, only the naive engine runs it"
    found = _difference(prior, PLANNED, "")
    return None if found is None else f"{found}, which only the naive engine runs"


def _difference(module: nn.Module, classes: tuple[type[nn.Module], ...], name: str) -> str | None:
    cls = type(module)
    if "parametrizations" in module._modules:
        cls = parametrize.type_before_parametrizations(module)
        for tensor, steps in module.parametrizations.items():  # type: ignore[operator, union-attr]
            other = next((step for step in steps if type(step) is not _WeightNorm), None)
            if other is not None:
                return f"{_title(name, cls)} has its {tensor} parametrised by {type(other).__name__}"
    base, changed, methods = _resolve(cls, classes)  # type: ignore[arg-type]
    if base is None:
        return f"{name} is a {cls.__name__}"
    attributes = module.__dict__
    if changed is not None or not methods.isdisjoint(attributes):
        own = changed or ", ".join(sorted(methods.intersection(attributes)))
        return f"{_title(name, cls)} has its own {own}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{_title(name, cls)} has forward hooks"
    if issubclass(base, nn.Conv2d) and _settings(attributes) != _PLAIN_VALUES:
        key = next(key for key, value in _PLAIN.items() if attributes[key] != value)
        return f"{_title(name, cls)} has {key} {attributes[key]!r}"
    children = module._modules
    dot = f"{name}." if name else ""
    for key, part in _PARTS[base].items():
        child = children.get(key)
        if child is None:
            if not part.optional:
                return f"{dot}{key} is missing"
        elif not part.many:
            found = _difference(child, part.classes, dot + key)
            if found is not None:
                return found
        elif type(child) is not nn.ModuleList:
            return f"{dot}{key} is a {type(child).__name__}"
        else:
            for index, entry in child._modules.items():
                path = f"{dot}{key}.{index}"
                found = f"{path} is missing" if entry is None else _difference(entry, part.classes, path)
                if found is not None:
                    return found
    return None


def _title(name: str, cls: type[nn.Module]) -> str:
    return f"{name} ({cls.__name__})" if name else f"the {cls.__name__}"


@functools.lru_cache(maxsize=256)
def _resolve(
    cls: type[nn.Module], classes: tuple[type[nn.Module], ...]
) -> tuple[type[nn.Module] | None, str | None, frozenset[str]]:
    """Which of the classes this is or derives from, what of it is overridden, and methods no object may have anew."""
    base = next((known for known in classes if issubclass(cls, known)), None)
    if base is None:
        return None, None, frozenset()
    missing = object()
    names = (*_METHODS, *_PARTS[base], "config", "background", "context_encoder", "weight", "bias")
    changed = next((n for n in names if getattr(cls, n, missing) is not getattr(base, n, missing)), None)
    return base, changed, frozenset(name for name in _METHODS if hasattr(base, name))
