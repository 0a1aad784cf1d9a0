"""Which axes of a tensor are samples, rows, columns and channels, through views and permutations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """A factor of a dimension: ``b`` samples, ``r`` rows, ``c`` columns or ``k`` channels."""

    name: str
    size: int


# A dimension is a product of axes, the first one slowest; of no axes where its size is 1.
Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def size(dim: Dim) -> int:
    return math.prod(axis.size for axis in dim)


def shape(layout: Layout) -> tuple[int, ...]:
    return tuple(size(dim) for dim in layout)


def axes(layout: Layout, name: str) -> list[Axis]:
    return [axis for dim in layout for axis in dim if axis.name == name]


def channels(layout: Layout) -> int:
    return math.prod(axis.size for axis in axes(layout, "k"))


def only(name: str, count: int) -> Dim:
    return (Axis(name, count),) if count > 1 else ()


def reshaped(layout: Layout, sizes: Sequence[int]) -> Layout | None:
    """The layout of a view of these sizes; None if it cuts through samples, rows or columns."""
    total = math.prod(shape(layout))
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes = [total // known if size == -1 else size for size in sizes]
    waiting = [axis for dim in layout for axis in dim]
    found: list[Dim] = []
    for wanted in sizes:
        dim: list[Axis] = []
        while wanted > 1:
            if not waiting:
                return None
            axis = waiting.pop(0)
            if wanted % axis.size == 0:
                dim.append(axis)
                wanted //= axis.size
            elif axis.name == "k" and axis.size % wanted == 0:
                dim.append(Axis("k", wanted))
                waiting.insert(0, Axis("k", axis.size // wanted))
                wanted = 1
            else:
                return None
        found.append(_merged(dim))
    return tuple(found) if not waiting else None


def _merged(dim: Sequence[Axis]) -> Dim:
    found: list[Axis] = []
    for axis in dim:
        if found and found[-1].name == axis.name == "k":
            found[-1] = Axis("k", found[-1].size * axis.size)
        else:
            found.append(axis)
    return tuple(found)


def permuted_channels(layout: Layout, order: Sequence[int]) -> list[int] | None:
    """Where channels of a permuted layout come from; None if their order stays."""
    each = [[axis.size for axis in dim if axis.name == "k"] for dim in layout]
    if [d for d in order if each[d]] == sorted(d for d in order if each[d]):
        return None
    index = torch.arange(channels(layout)).view([math.prod(sizes) for sizes in each])
    return index.permute(*order).flatten().tolist()


def canonical(x: Tensor, layout: Layout) -> Tensor:
    """A tensor that broadcasts to a layout as [B, C, rows, columns]."""
    batch = math.prod(axis.size for axis in axes(layout, "b"))
    sizes = (batch, channels(layout), *(math.prod(a.size for a in axes(layout, name)) for name in "rc"))
    every = [axis for dim in layout for axis in dim]
    order = [i for name in "bkrc" for i, axis in enumerate(every) if axis.name == name]
    return x.expand(shape(layout)).reshape([axis.size for axis in every]).permute(order).reshape(sizes)


def with_batch(layout: Layout, batch: int) -> Layout:
    """The layout with another number of samples; one of 1 keeps its place."""
    return tuple(tuple(Axis("b", batch) if axis.name == "b" else axis for axis in dim) for dim in layout)
