"""Sums, activations and gates."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastvq.sampling.own import layout as lay
from fastvq.sampling.own.base import Held, together
from fastvq.sampling.own.emit import Untraceable
from fastvq.sampling.own.products import Products
from fastvq.sampling.own.tensors import Traced, is_given
from fastvq.sampling.own.values import Joined, Linear, Pending, Table, Value, joined

BY_VALUE = {"_softmax"}
REASONS = {
    "copy_": "the network writes features into a part of a tensor; F.pad and torch.cat put them together as well",
    "_local_scalar_dense": "the network looks at the value of a code or feature, to decide something by it",
    "is_nonzero": "the network looks at the value of a code or feature, to decide something by it",
    "_softmax": "a softmax of features; a plan has attention over earlier positions",
    "native_layer_norm": "a norm over channels, which no operation of a plan does",
    "native_group_norm": "a norm over positions and channels, which no operation of a plan does",
    "gelu": "no operation of a plan does this; ELU, ReLU, leaky ReLU, SiLU, tanh and sigmoid are there",
}


class Elementwise(Products):
    """Operations on each number by itself, or on two of them."""

    def _by_value(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Any function of one code's vector alone is known for every code."""
        held = self._held(args[0]) if isinstance(args[0], Traced) and not is_given(args[0]) else None
        if held is None or not isinstance(held.value, Table) or _tensors(args[1:], kwargs):
            raise Untraceable(REASONS.get(name, "no operation of a plan does this"))
        plain = getattr(torch.ops.aten, name.rstrip("_")) if name.endswith("_") else func
        return self._result(name, args, held.value.apply(lambda x: plain(x, *args[1:], **kwargs)), held.layout)

    def _function(self, name: str, args: Any, kwargs: Any) -> Any:
        plain, held = name.rstrip("_"), self._held(args[0])
        value = held.value
        if isinstance(value, Table):
            return self._by_value(getattr(torch.ops.aten, plain), name, args, kwargs)
        if plain in ("sigmoid", "tanh"):
            return self._result(name, args, Pending(plain, self._linear(value)), held.layout)
        x = self._linear(value)
        if plain == "elu" and any(factor != 1 for factor in [*args[1:], *kwargs.values()]):
            raise Untraceable("only an ELU with factors of 1 is an operation of a plan")
        if plain == "silu":
            one = self.emitter.merged(x)
            twice = self.emitter.merged(Joined((one, one)))
            return self._result(name, args, Joined((self.emitter.elementwise("gate", "glu", twice),)), held.layout)
        if plain == "leaky_relu":
            slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
            parts = [self.emitter.alone(part) for part in x.parts]
            return self._result(name, args, Joined(tuple(self._leaky(part, slope) for part in parts)), held.layout)
        return self._result(name, args, self._once_cut(Pending(plain, x)), held.layout)

    def _leaky(self, x: Linear, slope: float) -> Linear:
        positive = self.emitter.elementwise("activation", "relu", x)
        share = torch.full((x.channels,), slope, device=self.device)
        return positive.scaled(1 - share, self.emitter.dense).plus(x.scaled(share, self.emitter.dense))

    def _log_softmax(self, name: str, args: Any, kwargs: Any) -> Any:
        """What is subtracted from logits is the same for all codes, and of no consequence at the end of a network."""
        held = self._held(args[0])
        if isinstance(held.value, Table) or lay.shape(held.layout)[args[1]] != self.num_codes:
            raise Untraceable("a log-softmax of something else than logits")
        self.normalised = True
        return args[0]

    def _glu(self, name: str, args: Any, kwargs: Any) -> Any:
        x = args[0]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.ndim
        one, two = self._split("split", (x, x.shape[dim] // 2, dim), {})
        gate = self._function("sigmoid", (two,), {})
        return self._mul("mul", (one, gate), {})

    def _add(self, name: str, args: Any, kwargs: Any) -> Any:
        a, b = args[0], args[1]
        factor = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        sign = -factor if name.startswith("sub") else factor
        if name.startswith("rsub"):
            a, b, sign = b, a, -factor
        if not isinstance(a, Traced) or is_given(a):
            if isinstance(b, Traced) and not is_given(b):
                b = self._mul("mul", (b, sign), {}) if sign != 1 else b
                return self._plus(name, b, a, args)
            raise Untraceable("it changes something that does not depend on codes")
        if isinstance(b, Traced) and not is_given(b):
            b = self._mul("mul", (b, sign), {}) if sign != 1 else b
            return self._sum(name, a, b, args)
        return self._plus(name, a, b, args, sign)

    def _sum(self, name: str, a: Traced, b: Traced, args: Any) -> Any:
        one, other = self._held(a), self._held(b)
        if one.layout != other.layout:
            raise Untraceable(f"it adds {list(a.shape)} and {list(b.shape)}")
        if isinstance(one.value, Table) and isinstance(other.value, Table) and one.value.like(other.value):
            return self._result(name, args, together([one.value, other.value], torch.add), one.layout)
        return self._result(name, args, self._summed(self._linear(one.value), self._linear(other.value)), one.layout)

    def _summed(self, x: Joined, y: Joined) -> Joined:
        bounds = sorted({*x.bounds(), *y.bounds()})
        pairs = [(x.cut(a, b).parts[0], y.cut(a, b).parts[0]) for a, b in itertools.pairwise(bounds)]
        # What is an operation already is not worked out again.
        return Joined(tuple(self.emitter.ready(a).plus(self.emitter.ready(b)) for a, b in pairs))

    def _plus(self, name: str, x: Traced, other: Any, args: Any, sign: float = 1) -> Any:
        """Features and what does not depend on codes, times a number."""
        held = self._held(x)
        vector = self._vector(other, held)
        if vector is not None:
            return self._result(name, args, self._moved(held.value, None, sign * vector), held.layout)
        static = self._static(other, held.layout, spread=False)
        if sign != 1:
            static = static.scaled(torch.full((static.channels,), float(sign), device=self.device), self.emitter.dense)
        return self._result(name, args, self._summed(self._linear(held.value), Joined((static,))), held.layout)

    def _mul(self, name: str, args: Any, kwargs: Any) -> Any:
        a, b = args[0], args[1]
        if not isinstance(a, Traced) or is_given(a):
            a, b = b, a
        held = self._held(a)
        if isinstance(b, Traced) and not is_given(b):
            return self._result(name, args, self._multiplied(held, self._held(b)), held.layout)
        vector = self._vector(b, held)
        if vector is None:
            raise Untraceable("it multiplies features by what differs between samples or positions")
        if name.startswith("div"):
            if b is not args[1]:
                raise Untraceable("it divides by features")
            vector = 1 / vector
        if isinstance(held.value, Table):
            return self._result(name, args, held.value.apply(lambda x: x * vector.to(_kind(x))), held.layout)
        return self._result(name, args, self._moved(held.value, vector, None), held.layout)

    def _neg(self, name: str, args: Any, kwargs: Any) -> Any:
        held = self._held(args[0])
        if isinstance(held.value, Joined):
            # It will be wanted as it is, too.
            args[0].value = Held(self._settled(held.value), held.layout)
        return self._mul("mul", (args[0], -1), {})

    def _multiplied(self, one: Held, other: Held) -> Value:
        if one.layout != other.layout:
            raise Untraceable("it multiplies features of different shapes")
        a, b = one.value, other.value
        if isinstance(a, Table) and isinstance(b, Table) and a.like(b):
            return together([a, b], torch.mul)
        if isinstance(a, Pending) and (a.name == "sigmoid" or not isinstance(b, Pending)):
            a, b = b, a
        if not isinstance(b, Pending) or b.name != "sigmoid":
            raise Untraceable(
                "it multiplies features by each other; a plan has a * sigmoid(b) and tanh(a) * sigmoid(b)"
            )
        if isinstance(a, Pending) and a.name == "tanh":
            return self._gated(a.of, b.of, "tanh")
        return self._gated(self._linear(a), b.of, "glu")

    def _gated(self, content: Joined, gate: Joined, variant: str) -> Value:
        return self._once_cut(Pending(f"gate {variant}", joined([*content.parts, *gate.parts])))


def _kind(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.is_floating_point else torch.float32


def _tensors(*args: Any) -> list[Tensor]:
    return [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]
