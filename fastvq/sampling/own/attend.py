"""Attention: products of queries and keys, a mask, a softmax, and a product with values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvq.sampling.own import layout as lay
from fastvq.sampling.own.elementwise import Elementwise
from fastvq.sampling.own.emit import NotCausal, Untraceable
from fastvq.sampling.own.layout import Axis, Dim, Layout
from fastvq.sampling.own.tensors import Traced, is_given
from fastvq.sampling.own.values import Joined, Linear, Scores

# A score of this or less is hidden: its exponential is no part of a float32 sum.
_HIDDEN = -1e4
# A sigmoid of it is 1 in float32, and of minus it 0.
_SURE = 200.0
# Positions of keys, as axes of scores.
_KEYS = {"r": "R", "c": "C"}
_QUERIES = {name: own for own, name in _KEYS.items()}


class Attention(Elementwise):
    """Operations on two positions at a time."""

    def of_scores(self, args: Any) -> bool:
        return any(isinstance(x, Traced) and not is_given(x) and isinstance(self._held(x).value, Scores) for x in args)

    def _bmm(self, name: str, args: Any, kwargs: Any) -> Any:
        a, b = args
        if not all(isinstance(x, Traced) and not is_given(x) for x in (a, b)):
            raise Untraceable("a product of features and a matrix for each sample")
        one, other = self._held(a), self._held(b)
        (x, first, second), (y, third, fourth) = one.layout, other.layout
        if x != y or [axis.name for axis in x[:1]] != ["b"] or any(axis.name != "k" for axis in x[1:]):
            raise Untraceable("a product of features that is no attention over positions")
        if _is_places(first) and _is_places(fourth) and second == third and _is_channels(second):
            heads, width = math.prod(axis.size for axis in x[1:]), lay.size(second)
            scores = Scores(self._linear(one.value), self._linear(other.value), heads, width)
            return self._wrap(scores, (x, first, _renamed(fourth, _KEYS)), a.dtype)
        raise Untraceable("a product of features that is no attention over positions")

    def _baddbmm(self, name: str, args: Any, kwargs: Any) -> Any:
        if kwargs.get("beta", 1) != 1 or isinstance(args[0], Traced):
            raise Untraceable("a product with factors of its own")
        scores = self._bmm("bmm", args[1:3], {})
        scores = self._times("mul", (scores, kwargs.get("alpha", 1)), {})
        return self._added("add", (scores, args[0]), {})

    def _library_attention(self, name: str, args: Any, kwargs: Any) -> Any:
        """What PyTorch's own layers call: their second result is of no use without gradients."""
        causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
        given = {"attn_mask": kwargs.get("attn_mask"), "scale": kwargs.get("scale"), "is_causal": causal}
        return self._whole_attention(name, args[:3], given), torch.empty(0)

    def _weighted(self, name: str, args: Any, kwargs: Any) -> Any:
        """Weights times values, or values times weights."""
        a, b = args
        if not all(isinstance(x, Traced) and not is_given(x) for x in (a, b)):
            raise Untraceable("a product of attention's weights and a constant")
        one, other = self._held(a), self._held(b)
        layout: Layout
        if isinstance(one.value, Scores):
            weights, value = one, other
            fits = one.layout[2] == _renamed(other.layout[1], _KEYS) and _is_channels(other.layout[2])
            layout = (one.layout[0], one.layout[1], other.layout[2])
        else:
            weights, value = other, one
            fits = other.layout[1] == _renamed(one.layout[2], _KEYS) and _is_channels(one.layout[1])
            layout = (one.layout[0], one.layout[1], other.layout[2])
        if isinstance(value.value, Scores) or not fits or one.layout[0] != other.layout[0]:
            raise Untraceable("a product of attention's weights and something else than values of positions")
        assert isinstance(weights.value, Scores)
        return self._wrap(self._attended(weights.value, self._linear(value.value)), layout, a.dtype)

    def _attended(self, scores: Scores, value: Joined) -> Joined:
        if not scores.weights:
            raise Untraceable("a product of scores without a softmax")
        count = math.prod(self.grid)
        every = torch.ones(count, count, dtype=torch.bool, device=self.device)
        seen = every if scores.hidden is None else ~scores.hidden
        if scores.zeroed is not None and bool((scores.zeroed & seen).any()):
            raise Untraceable("a mask that sets scores to zero, which still count in a softmax")
        kept = every if scores.kept is None else scores.kept
        inclusive, strict = every.tril(), every.tril(-1)
        if bool((seen & kept & ~inclusive).any()):
            raise NotCausal("attention sees positions that come later")
        rows = slice(1, None)
        if bool((seen & ~kept)[rows].any()):
            raise Untraceable("a mask on attention's weights that hides what their softmax counts")
        query, key, of = (self.emitter.merged(x) for x in (scores.query, scores.key, value))
        factor = scores.scale * math.sqrt(scores.width)
        if abs(factor - 1) > 1e-6:
            query = query.scaled(torch.full((query.channels,), factor, device=self.device), self.emitter.dense)
        if torch.equal(seen, inclusive):
            if not bool(kept[0, 0]):
                raise Untraceable("attention that sees the position itself, but not at the first one")
            return Joined((self.emitter.attention(query, key, of, scores.heads, "inclusive"),))
        if not torch.equal(seen[rows], strict[rows]):
            raise Untraceable("its mask shows neither all earlier positions nor those and the position itself")
        found = self.emitter.attention(query, key, of, scores.heads, "strict")
        nothing = not bool(kept[0].any()) or (scores.clean and not bool(seen[0].any()))
        if nothing:
            return Joined((found,))
        if not bool(seen[0].any()):
            raise NotCausal("at the first position, where attention may see nothing, it sees everything")
        return Joined((found.plus(self._at_first(of)),))

    def _at_first(self, value: Linear) -> Linear:
        """A vector at the first position, and zero elsewhere."""
        switch = torch.full((1, value.channels, *self.grid), -_SURE, device=self.device)
        switch[:, :, 0, 0] = _SURE
        gate = self.emitter.constant(switch)
        both = self.emitter.merged(Joined((self.emitter.alone(value), gate)))
        return self.emitter.elementwise("gate", "glu", both)

    def _whole_attention(self, name: str, args: Any, kwargs: Any) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (given[name] for name in names[:3])
        mask, causal, scale = given.get("attn_mask"), given.get("is_causal", False), given.get("scale")
        if not all(isinstance(x, Traced) and not is_given(x) for x in (query, key, value)):
            raise Untraceable("attention to or from something that does not depend on codes")
        width = query.shape[-1]
        held = [self._held(x) for x in (query, key, value)]
        if any(not (_is_places(one.layout[-2]) and _is_channels(one.layout[-1])) for one in held):
            raise Untraceable("attention over something else than positions")
        heads = lay.channels(held[0].layout[:-2])
        scores = Scores(
            self._linear(held[0].value), self._linear(held[1].value), heads, width, scale or width**-0.5, weights=True
        )
        count = math.prod(self.grid)
        every = torch.ones(count, count, dtype=torch.bool, device=self.device)
        layout = (*held[0].layout[:-1], _renamed(held[1].layout[-2], _KEYS))
        hidden = None
        if causal:
            hidden = ~every.tril()
        elif mask is not None:
            matrix = self._matrix(mask, layout)
            hidden = ~matrix if matrix.dtype == torch.bool else self._hidden_by(matrix)
        found = self._attended(dataclasses.replace(scores, hidden=hidden), self._linear(held[2].value))
        return self._wrap(found, (*held[0].layout[:-1], held[2].layout[-1]), query.dtype)

    # What is done to scores and weights.

    def _matrix(self, x: Any, layout: Layout) -> Tensor:
        """A constant for all scores, [N, N] by query and key."""
        if isinstance(x, Traced):
            raise Untraceable("a mask that depends on codes, condition or label")
        every = [axis for dim in layout for axis in dim]
        order = [i for name in "rcRC" for i, axis in enumerate(every) if axis.name == name]
        rest = [i for i in range(len(every)) if i not in order]
        count = math.prod(self.grid)
        full = torch.as_tensor(x, device=self.device).expand(lay.shape(layout))
        full = full.reshape([axis.size for axis in every]).permute([*rest, *order]).reshape(-1, count, count)
        if bool((full != full[:1]).any()):
            raise Untraceable("a mask that differs between samples or heads")
        return full[0]

    @staticmethod
    def _hidden_by(added: Tensor) -> Tensor:
        hidden = added <= _HIDDEN
        if bool((added[~hidden] != 0).any()):
            raise Untraceable("numbers that are added to scores, other than 0 and less than -10000")
        return hidden

    def _scores(self, args: Any, **changes: Any) -> Any:
        return dataclasses.replace(self._held(args[0]).value, **changes)

    def _added(self, name: str, args: Any, kwargs: Any) -> Any:
        held = self._held(args[0]) if isinstance(args[0], Traced) and not is_given(args[0]) else None
        if held is None or not isinstance(held.value, Scores) or isinstance(args[1], Traced) or held.value.weights:
            raise Untraceable("it adds something to attention's scores that is no mask")
        factor = kwargs.get("alpha", args[2] if len(args) > 2 else 1) * (-1 if name.startswith("sub") else 1)
        added = self._hidden_by(self._matrix(args[1], held.layout).float() * factor)
        return self._changed(name, args, hidden=_either(held.value.hidden, added))

    def _changed(self, name: str, args: Any, **changes: Any) -> Any:
        return self._result(name, args, self._scores(args, **changes), self._held(args[0]).layout)

    def _times(self, name: str, args: Any, kwargs: Any) -> Any:
        if not isinstance(args[0], Traced) or is_given(args[0]):
            args = (args[1], args[0])
        held, other = self._held(args[0]), args[1]
        scores = held.value
        if not isinstance(scores, Scores) or isinstance(other, Traced):
            raise Untraceable("it multiplies attention's scores by what depends on codes")
        if not isinstance(other, Tensor) or other.numel() == 1:
            factor = 1 / float(other) if name.startswith("div") else float(other)
            if scores.weights or (scores.hidden is not None and factor <= 0):
                raise Untraceable("it multiplies attention's weights")
            return self._changed(name, args, scale=scores.scale * factor)
        matrix = self._matrix(other, held.layout)
        if name.startswith("div") or not bool(((matrix == 0) | (matrix == 1)).all()):
            raise Untraceable("it multiplies attention's scores by something else than a mask")
        gone = matrix == 0
        if scores.weights:
            return self._changed(name, args, kept=~gone if scores.kept is None else scores.kept & ~gone)
        return self._changed(name, args, zeroed=_either(scores.zeroed, gone))

    def _filled(self, name: str, args: Any, kwargs: Any) -> Any:
        held, value = self._held(args[0]), float(args[2])
        scores = held.value
        assert isinstance(scores, Scores)
        mask = self._matrix(args[1], held.layout).bool()
        if scores.weights and value == 0:
            return self._changed(name, args, kept=~mask if scores.kept is None else scores.kept & ~mask)
        if scores.weights or value > _HIDDEN:
            raise Untraceable(f"it sets attention's scores to {value}")
        return self._changed(name, args, hidden=_either(scores.hidden, mask))

    def _where(self, name: str, args: Any, kwargs: Any) -> Any:
        condition, a, b = args
        if isinstance(a, Traced) and not isinstance(b, Traced):
            return self._filled("masked_fill", (a, ~condition, b), {})
        if isinstance(b, Traced) and not isinstance(a, Traced):
            return self._filled("masked_fill", (b, condition, a), {})
        raise Untraceable("it chooses between scores")

    def _softmax(self, name: str, args: Any, kwargs: Any) -> Any:
        held = self._held(args[0])
        scores, layout, dim = held.value, held.layout, args[1] % args[0].ndim
        assert isinstance(scores, Scores)
        if _is_places(layout[dim]):
            # What was taken for queries are keys.
            layout = tuple(_swapped(one) for one in layout)
            hidden, zeroed = (None if x is None else x.t() for x in (scores.hidden, scores.zeroed))
            scores = dataclasses.replace(scores, query=scores.key, key=scores.query, hidden=hidden, zeroed=zeroed)
        if not _is_places(_renamed(layout[dim], _QUERIES)) or scores.weights:
            raise Untraceable("a softmax of scores over something else than positions")
        return self._wrap(dataclasses.replace(scores, weights=True), layout, args[0].dtype)

    def _averaged(self, name: str, args: Any, kwargs: Any) -> Any:
        """Over heads: what PyTorch's layers return beside their result. Nothing can be done with it here."""
        held = self._held(args[0])
        gone = {dim % args[0].ndim for dim in args[1]}
        layout = tuple(dim for index, dim in enumerate(held.layout) if index not in gone)
        return self._wrap(self._scores(args, weights=False, heads=0), layout)

    def _cleaned(self, name: str, args: Any, kwargs: Any) -> Any:
        return self._changed(name, args, clean=True)


def _either(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one | other


def _is_places(dim: Dim) -> bool:
    return bool(dim) and [axis.name for axis in dim] in (["r", "c"], ["r"], ["c"])


def _is_channels(dim: Dim) -> bool:
    return all(axis.name == "k" for axis in dim)


def _renamed(dim: Dim, names: dict[str, str]) -> Dim:
    return tuple(Axis(names.get(axis.name, axis.name), axis.size) for axis in dim)


def _swapped(dim: Dim) -> Dim:
    return _renamed(dim, {**_KEYS, **_QUERIES})


_A = Attention
SCORES: dict[str, Callable[[Any, str, Any, Any], Any]] = {
    "bmm": _A._weighted,
    **dict.fromkeys(("add", "add_", "sub", "sub_"), _A._added),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _A._times),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _A._filled),
    "where": _A._where,
    "_softmax": _A._softmax,
    "nan_to_num": _A._cleaned,
    "mean": _A._averaged,
}
