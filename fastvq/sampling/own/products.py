"""Convolutions, matrix products, embeddings and norms with fixed statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvq.sampling.own import layout as lay
from fastvq.sampling.own.base import columns_of, rows_of
from fastvq.sampling.own.emit import Untraceable
from fastvq.sampling.own.shapes import Shapes
from fastvq.sampling.own.tensors import Traced, is_given
from fastvq.sampling.own.values import Joined, Table, Value


class Products(Shapes):
    """Operations with weights."""

    def _convolution(self, name: str, args: Any, kwargs: Any) -> Any:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        if not isinstance(x, Traced) or is_given(x) or isinstance(weight, Traced):
            raise Untraceable("its weights depend on the codes")
        if x.ndim != 4 or transposed or any(s != 1 for s in stride):
            kind = "transposed" if transposed else f"of {x.ndim - 2} dimensions with stride {list(stride)}"
            raise Untraceable(f"a convolution that is {kind}")
        held = self._held(x)
        value: Value = held.value
        for axis, count in zip("rc", padding, strict=True):
            if count:
                value = self._around(value, axis, count, count, 0)
        weight = _ungrouped(weight.float(), groups)  # [C_out, C_in, kh, kw]
        taps = [
            (a, b) for a in range(weight.shape[2]) for b in range(weight.shape[3]) if bool(weight[:, :, a, b].any())
        ] or [(0, 0)]
        rows = rows_of(value) - (weight.shape[2] - 1) * dilation[0]
        columns = columns_of(value) - (weight.shape[3] - 1) * dilation[1]
        matrices = [(a * dilation[0], b * dilation[1], weight[:, :, a, b].t()) for a, b in taps]
        found = self._products(value, matrices, None if bias is None else bias.float(), rows, columns)
        layout = (held.layout[0], lay.only("k", len(weight)), lay.only("r", rows), lay.only("c", columns))
        return self._wrap(found, layout, x.dtype)

    def _products(
        self, value: Value, matrices: Sequence[tuple[int, int, Tensor]], bias: Tensor | None, rows: int, columns: int
    ) -> Value:
        """The sum over taps (dr, dc) of what is there times [C_in, C_out]."""
        if isinstance(value, Table):
            if len(matrices) == 1 and (rows, columns) == (value.rows, value.columns):
                weight = matrices[0][2]
                return value.apply(lambda x: x.float() @ weight if bias is None else x.float() @ weight + bias)
            sums = [value.linear(weight).window(dr, dc, rows, columns) for dr, dc, weight in matrices]
            total = sums[0]
            for one in sums[1:]:
                total = total.plus(one)
            return Joined((total if bias is None else total.shifted_by(bias),))
        x = self._linear(value)
        parts, first = [], 0
        for part in x.parts:
            for dr, dc, weight in matrices:
                own = weight[first : first + part.channels]
                if len(x.parts) == 1 or bool(own.any()):
                    parts.append((part, dr, dc, own))
            first += part.channels
        if not parts:
            parts = [(x.parts[0], 0, 0, matrices[0][2][: x.parts[0].channels])]
        return Joined((self.emitter.convolved(parts, bias).window(0, 0, rows, columns),))

    def _mm(self, name: str, args: Any, kwargs: Any) -> Any:
        bias, (x, weight) = (None, args) if name == "mm" else (args[0], args[1:3])
        if not isinstance(x, Traced) or isinstance(weight, Traced) or isinstance(bias, Traced):
            raise Untraceable("a product of features with each other")
        held = self._held(x)
        if any(axis.name != "k" for axis in held.layout[1]) or lay.channels(held.layout[:1]) > 1:
            raise Untraceable("a product along positions")
        shaped = bias is None or bias.shape == weight.shape[1:]
        if not shaped or kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
            raise Untraceable("a product with factors of its own")
        value = held.value
        bias = None if bias is None else bias.float()
        found = self._products(value, [(0, 0, weight.float())], bias, rows_of(value), columns_of(value))
        return self._wrap(found, (held.layout[0], lay.only("k", weight.shape[1])), x.dtype)

    def _embedding(self, name: str, args: Any, kwargs: Any) -> Any:
        weight, index = args[0], args[1]
        if isinstance(weight, Traced):
            raise Untraceable("its vectors depend on the codes")
        held = self._held(index)
        table = held.value
        if not isinstance(table, Table) or table.channels != 1:
            raise Untraceable("it looks up something else than a code")
        found = table.apply(lambda rows: _looked_up(weight, rows[:, 0]))
        return self._wrap(found, (*held.layout, lay.only("k", weight.shape[1])))

    def _one_hot(self, name: str, args: Any, kwargs: Any) -> Any:
        count = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        count = self.num_codes if count == -1 else count
        table = self._held(args[0]).value
        if not isinstance(table, Table) or table.channels != 1:
            raise Untraceable("it takes something else than codes")
        eye = torch.eye(count, dtype=torch.int64, device=self.device)
        found = table.apply(lambda rows: _looked_up(eye, rows[:, 0]))
        return self._wrap(found, (*self._held(args[0]).layout, lay.only("k", count)))

    def _batch_norm(self, name: str, args: Any, kwargs: Any) -> Any:
        x, weight, bias, mean, variance, training = args[:6]
        eps = args[7]
        if training or mean is None or variance is None:
            raise Untraceable("a batch norm that uses statistics of the batch")
        scale = torch.rsqrt(variance.double() + eps) * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        held = self._held(x)
        if held.layout[1:2] != (lay.only("k", len(mean)),):
            raise Untraceable("its channels are not in dimension 1")
        found = self._moved(held.value, scale.float(), shift.float())
        empty = torch.empty(0)
        return self._wrap(found, held.layout, x.dtype), empty, empty


def _looked_up(vectors: Tensor, index: Tensor) -> Tensor:
    if bool((index < 0).any()) or bool((index >= len(vectors)).any()):
        raise Untraceable(f"a code or what it is padded with is not in 0..{len(vectors) - 1}")
    return vectors[index.long()]


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weights of one convolution in place of several side by side."""
    if groups == 1:
        return weight
    out, own = weight.shape[:2]
    full = weight.new_zeros(out, own * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        full[rows, group * own : (group + 1) * own] = weight[rows]
    return full
