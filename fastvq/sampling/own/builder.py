"""Plans written by hand for networks that cannot be traced, out of the same operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastvq._check import require_choice, require_positive_int, require_shape, require_tensor
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.sampling.own.emit import Emitter, Untraceable
from fastvq.sampling.own.values import Joined, Linear, Table
from fastvq.sampling.plan import Graph

# Of a condition (one [B, h, w] for each level above) and a label [B] or None: float32 [B, C, H, W] or [B, C, 1, 1].
GivenValues = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Feature:
    """A vector at every position of the grid, zero outside of it."""

    builder: PlanBuilder
    value: Joined | Table

    @property
    def channels(self) -> int:
        return self.value.channels


class PlanBuilder:
    """Operations of a plan, in the order in which a network computes them; see :func:`fastvq.with_plan`.

    Every method gives a :class:`Feature`, C channels at each position. Weights are those of PyTorch's layers, and are
    copied in float32. What an operation reads has to be known where it is computed: codes before a position in raster
    order, features at or before it.

    Args:
        shape: grid (H, W).
        num_codes: K.
        device: where weights are taken to.

    Raises:
        ArgumentError, ArgumentTypeError: every method, where what it is given does not fit.
    """

    def __init__(self, shape: tuple[int, int], num_codes: int, device: torch.device | str = "cpu") -> None:
        self.shape, self.num_codes = shape, num_codes
        self.emitter = Emitter(Graph(spatial_context=False), shape, num_codes, torch.device(device))
        self.values: dict[str, GivenValues] = {}

    def embedding(self, weight: Tensor) -> Feature:
        """A vector for the code at each position, by ``weight`` [K, C]; convolutions read it, nothing else may."""
        weight = self._weight("weight", weight, [self.num_codes, None])
        return Feature(self, Table(weight, None, 0, 0, *self.shape))

    def conv(
        self,
        x: Feature,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        at: tuple[int, int] | None = None,
    ) -> Feature:
        """A convolution with zeros around the grid.

        Args:
            x: what it reads.
            weight: [C_out, C_in, h, w]; entries that are zero for all channels are not read.
            bias: [C_out].
            mask: broadcasts to the weights, and is multiplied into them.
            at: row and column of the kernel's entry that lies at the position itself; the default is its middle
                (h // 2, w // 2).
        """
        weight = self._weight("weight", weight, [None, self._feature("x", x).channels, None, None])
        if mask is not None:
            weight = weight * require_tensor("mask", mask).to(weight)
        bias = None if bias is None else self._weight("bias", bias, [len(weight)])
        height, width = weight.shape[2:]
        row, column = (height // 2, width // 2) if at is None else at
        if not (0 <= row < height and 0 <= column < width):
            raise ArgumentError(f"at: expected an entry of a kernel of {height} x {width}, got {at}")
        taps = [(a, b) for a in range(height) for b in range(width) if bool(weight[:, :, a, b].any())] or [(0, 0)]
        matrices = [(a - row, b - column, weight[:, :, a, b].t()) for a, b in taps]
        if isinstance(x.value, Table):
            total = x.value.linear(matrices[0][2]).window(*matrices[0][:2], *self.shape)
            for dr, dc, matrix in matrices[1:]:
                total = total.plus(x.value.linear(matrix).window(dr, dc, *self.shape))
            return self._made(total if bias is None else total.shifted_by(bias))
        one = self.emitter.merged(x.value)
        return self._made(self.emitter.convolved([(one, *matrix) for matrix in matrices], bias))

    def linear(self, x: Feature, weight: Tensor, bias: Tensor | None = None) -> Feature:
        """A 1 x 1 convolution of ``x``, weight [C_out, C_in] and bias [C_out]."""
        weight = self._weight("weight", weight, [None, self._feature("x", x).channels])
        return self.conv(x, weight[:, :, None, None], bias)

    def activation(self, x: Feature, name: Literal["relu", "elu", "concat_elu"]) -> Feature:
        """ReLU, ELU, or ELU of [x, -x] with twice the channels, by ``name``."""
        require_choice("name", name, ("relu", "elu", "concat_elu"))
        return self._made(self.emitter.elementwise("activation", name, self._vector("x", x)))

    def gate(self, x: Feature, gate: Feature, name: Literal["tanh", "glu"] = "tanh") -> Feature:
        """tanh(x) * sigmoid(gate), or with the ``name`` ``glu`` x * sigmoid(gate)."""
        require_choice("name", name, ("tanh", "glu"))
        both = self.concat([x, gate])
        if x.channels != gate.channels:
            raise ArgumentError(f"gate: expected {x.channels} channels as x has, got {gate.channels}")
        return self._made(self.emitter.elementwise("gate", name, self._vector("x", both)))

    def add(self, x: Feature, y: Feature) -> Feature:
        """x + y, two features of the same number of channels."""
        a, b = self._vector("x", x), self._vector("y", y)
        if a.channels != b.channels:
            raise ArgumentError(f"y: expected {a.channels} channels as x has, got {b.channels}")
        return self._made(self.emitter.ready(a).plus(self.emitter.ready(b)))

    def concat(self, features: Sequence[Feature]) -> Feature:
        """Channels of several ``features``, one after the other."""
        return Feature(self, Joined(tuple(self._vector(f"features[{i}]", x) for i, x in enumerate(features))))

    def channels(self, x: Feature, start: int, stop: int) -> Feature:
        """Channels ``start`` to ``stop`` - 1 of ``x``."""
        one = self._vector("x", x)
        if not 0 <= start < stop <= one.channels:
            raise ArgumentError(f"start, stop: expected a part of {one.channels} channels, got {start}, {stop}")
        return Feature(self, Joined((one.cut(start, stop),)))

    def attention(
        self, query: Feature, key: Feature, value: Feature, *, heads: int = 1, mask: Literal["strict", "inclusive"]
    ) -> Feature:
        """softmax(q . k / sqrt(width of a head)) v over positions.

        Args:
            query, key, value: q and k of the same number of channels, and v.
            heads: parts of the channels, one after the other.
            mask: ``strict`` for the positions before (nothing at the first one), ``inclusive`` for these and the
                position itself.
        """
        require_choice("mask", mask, ("strict", "inclusive"))
        q, k, v = (self._vector(*pair) for pair in (("query", query), ("key", key), ("value", value)))
        require_positive_int("heads", heads)
        if q.channels != k.channels or q.channels % heads or v.channels % heads:
            raise ArgumentError(
                f"query, key, value: expected channels of query and key alike, and all divisible by {heads} heads, "
                f"got {q.channels}, {k.channels} and {v.channels}"
            )
        return self._made(self.emitter.attention(q, k, v, heads, mask))

    def constant(self, values: Tensor) -> Feature:
        """What is always the same, ``values`` [C, H, W]."""
        values = self._weight("values", values, [None, *self.shape])
        return self._made(self.emitter.constant(values[None]))

    def given(self, values: GivenValues, channels: int, *, everywhere: bool = False) -> Feature:
        """What follows from condition and label.

        Args:
            values: called with the levels above, a tuple of int64 [B, h, w], and the label, int64 [B] or None; gives
                [B, C, H, W].
            channels: C.
            everywhere: it is the same at all positions, and ``values`` gives [B, C, 1, 1].
        """
        if not callable(values):
            raise ArgumentTypeError(f"values: expected a function, got {type(values).__name__}")
        name = f"{'label' if everywhere else 'context'}.{len(self.values)}"
        self.values[name] = values
        return self._made(self.emitter.static(name, require_positive_int("channels", channels)))

    def output(self, logits: Feature) -> int:
        """Number of the operation that gives ``logits``, a feature of K channels."""
        one = self._vector("logits", logits)
        if one.channels != self.num_codes:
            raise ArgumentError(f"logits: expected {self.num_codes} channels, one for each code, got {one.channels}")
        with _refusing():
            return self.emitter.output(one)

    def _made(self, x: Linear) -> Feature:
        with _refusing():
            return Feature(self, Joined((self.emitter.alone(x),)))

    def _feature(self, name: str, x: Feature) -> Feature:
        if not isinstance(x, Feature) or x.builder is not self:
            kind = "one of another builder" if isinstance(x, Feature) else type(x).__name__
            raise ArgumentTypeError(f"{name}: expected a feature of this builder, got {kind}")
        return x

    def _vector(self, name: str, x: Feature) -> Linear:
        value = self._feature(name, x).value
        if isinstance(value, Table):
            raise ArgumentError(f"{name}: the embedding of codes is read by convolutions alone, which leave a code out")
        return self.emitter.merged(value)

    def _weight(self, name: str, weight: Tensor, shape: Sequence[int | None]) -> Tensor:
        weight = require_tensor(name, weight).detach().to(self.emitter.device, torch.float32)
        require_shape(name, weight, list(shape))
        return weight.clone()


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What cannot be an operation of a plan is an argument that does not fit."""
    try:
        yield
    except Untraceable as error:
        raise ArgumentError(f"x: {error}") from error
