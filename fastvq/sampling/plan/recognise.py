"""Whether a prior still computes what a plan of it would compute."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from fastvq.models.blocks import CausalConv2d, CodeConv2d, GatedBlock, PointwiseConv2d

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
    "statics",
    "check_codes",
    "check_condition",
    "check_label",
)
# And these, where a class of objects has them instead of what it was built with.
_ATTRIBUTES = ("config", "context_encoder", "taps", "weight", "bias")
# What nn.Conv2d must be set to; the kernel's size is read off its weights.
_PLAIN = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0), "padding_mode": "zeros"}
_settings = operator.itemgetter(*_PLAIN)
_PLAIN_VALUES = tuple(_PLAIN.values())


class Part(NamedTuple):
    """A submodule that a plan reads: of one of these classes, or a list of them, or absent."""

    classes: tuple[type[nn.Module], ...]
    many: bool = False
    optional: bool = False


CONV = Part((nn.Conv2d,))
MAYBE_CONV = Part((nn.Conv2d,), optional=True)
POINTWISE = Part((PointwiseConv2d,))
CODES = Part((CodeConv2d,))
CODES_LIST = Part((CodeConv2d,), many=True)
GATED = Part((GatedBlock,))
GATED_LIST = Part((GatedBlock,), many=True)
_EITHER = Part((PointwiseConv2d, CausalConv2d))

# What a plan reads of the blocks that priors share. The context encoder is not among it: it is no part of a plan.
_SHARED: dict[type[nn.Module], Mapping[str, Part]] = {
    GatedBlock: {"conv1": _EITHER, "conv2": _EITHER, "aux": MAYBE_CONV, "context": MAYBE_CONV},
    CodeConv2d: {},
    CausalConv2d: {},
    PointwiseConv2d: {},
    nn.Conv2d: {},
}


@dataclass(frozen=True, eq=False)
class Known:
    """What a writer of plans takes for granted; see :func:`fastvq.sampling.plan.writes`.

    Attributes:
        free: settings of ``nn.Conv2d`` that may be any: who reads the weights reads them too.
    """

    own: Mapping[type[nn.Module], Mapping[str, Part]]
    also: tuple[str, ...]
    free: tuple[str, ...] = ()

    def parts(self, cls: type[nn.Module]) -> Mapping[str, Part]:
        return self.own[cls] if cls in self.own else _SHARED[cls]


def difference(module: nn.Module, classes: tuple[type[nn.Module], ...], name: str, known: Known) -> str | None:
    """What makes a module compute something else than one of these classes with its weights, or None."""
    cls = type(module)
    if "parametrizations" in module._modules:
        cls = parametrize.type_before_parametrizations(module)
        for tensor, steps in module.parametrizations.items():  # type: ignore[operator, union-attr]
            other = next((step for step in steps if type(step) is not _WeightNorm), None)
            if other is not None:
                return f"{_title(name, cls)} has its {tensor} parametrised by {type(other).__name__}"
    base, changed, methods = _resolve(cls, classes, known)  # type: ignore[arg-type]
    if base is None:
        return f"{name} is a {cls.__name__}"
    attributes = module.__dict__
    if changed is not None or not methods.isdisjoint(attributes):
        own = changed or ", ".join(sorted(methods.intersection(attributes)))
        return f"{_title(name, cls)} has its own {own}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{_title(name, cls)} has forward hooks"
    if issubclass(base, nn.Conv2d) and _settings(attributes) != _PLAIN_VALUES:
        settings = (key for key in _PLAIN if key not in known.free)
        key = next((key for key in settings if attributes[key] != _PLAIN[key]), None)
        if key is not None:
            return f"{_title(name, cls)} has {key} {attributes[key]!r}"
    children = module._modules
    dot = f"{name}." if name else ""
    for key, part in known.parts(base).items():
        child = children.get(key)
        if child is None:
            if not part.optional:
                return f"{dot}{key} is missing"
        elif not part.many:
            found = difference(child, part.classes, dot + key, known)
            if found is not None:
                return found
        elif type(child) is not nn.ModuleList:
            return f"{dot}{key} is a {type(child).__name__}"
        else:
            for index, entry in child._modules.items():
                path = f"{dot}{key}.{index}"
                found = f"{path} is missing" if entry is None else difference(entry, part.classes, path, known)
                if found is not None:
                    return found
    return None


def _title(name: str, cls: type[nn.Module]) -> str:
    return f"{name} ({cls.__name__})" if name else f"the {cls.__name__}"


@functools.lru_cache(maxsize=256)
def _resolve(
    cls: type[nn.Module], classes: tuple[type[nn.Module], ...], known: Known
) -> tuple[type[nn.Module] | None, str | None, frozenset[str]]:
    """Which of the classes this is or derives from, what of it is overridden, and methods no object may have anew."""
    base = next((wanted for wanted in classes if issubclass(cls, wanted)), None)
    if base is None:
        return None, None, frozenset()
    missing = object()
    methods = (*_METHODS, *known.also)
    names = (*methods, *known.parts(base), *_ATTRIBUTES)
    changed = next((n for n in names if getattr(cls, n, missing) is not getattr(base, n, missing)), None)
    return base, changed, frozenset(name for name in methods if hasattr(base, name))
