"""The weights of what kernels for whole steps work out, packed for their products, and how these are cut into parts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.kernels.front_tiles import (
    PACKED_COLUMNS,
    PLANES,
    ProductTiles,
    draw_tiles,
    product_depth,
    product_tiles,
    tail_tiles,
)
from fastvq.kernels.launch import hardware
from fastvq.sampling.engines.front_program import FrontProgram
from fastvq.sampling.engines.front_work import Work
from fastvq.sampling.options import Precision
from fastvq.sampling.plan.form import Op, Term, require_finite

# Programs of one tile of positions that keep a large chip's memory busy. It decides how sums are cut, so it is one
# number for all chips.
PROGRAMS = 200
# Of a part, at least: shorter ones would spend more on adding up than on products. Late parts are this long.
_LEAST_CHUNKS, _LATE_CHUNKS = 2, 4
_LARGEST = torch.finfo(torch.bfloat16).max


class Segment(NamedTuple):
    """Some of the depth of a term: its chunks ``first`` to ``last - 1``, counted tap by tap."""

    term: Term
    weights: int
    first: int
    last: int


# What one program adds up, one after the other.
Part = list[Segment]


class Sum(NamedTuple):
    """An affine operation as parts, in the order of addition.

    Attributes:
        early: parts that read nothing of the position itself but what is known beforehand.
        late: the others.
        bias: its place among the parameters.
    """

    op: Op
    early: list[Part]
    late: list[Part]
    bias: int


class Cut:
    """How the sums of some work are cut, and where its weights lie. It depends on shapes alone, not on the batch.

    Args:
        programs: of a launch, that are wanted where there is one tile of positions. Bits depend on it.
        capability: compute capability of the GPU, such as 90.

    Attributes:
        planes, depth: of a tile of weights.
        tail: tiles of the kernel of what follows products.
        unit: numbers that places of features count in.
        sums: by operation.
        lookups: by operation: places of its bias, its table and its taps.
    """

    def __init__(self, work: Work, precision: Precision, *, programs: int = PROGRAMS, capability: int = 90) -> None:
        self.work, self._precision, self._capability = work, precision, capability
        self.planes, self.depth, self.tail = PLANES[precision], product_depth(precision), tail_tiles(capability)
        self.unit = math.gcd(self.depth, *(work.ops[index].channels for index in work.shared))
        self.program = FrontProgram(work)
        self.made = [work.ops[index] for index in sorted(work.made)]
        self.sums: dict[int, Sum] = {}
        self.lookups: dict[int, tuple[int, int, int]] = {}
        length = self._length(programs)
        tiles = numbers = taps = 0
        for op in self.made:
            if op.kind not in ("affine", "lookup"):
                continue
            bias, numbers = numbers, numbers + op.channels
            if op.weight is not None:
                self.lookups[op.index] = (bias, numbers, taps)
                numbers, taps = numbers + op.weight.numel(), taps + len(op.taps)
                continue
            early: list[Segment] = []
            late: list[Segment] = []
            for term in op.terms:
                chunks = self.chunks(term)
                here = (len(term.taps) - work.waits(term)) * chunks
                early += _segments(term, tiles, 0, here)
                late += _segments(term, tiles, here, len(term.taps) * chunks)
                tiles += self.packed_tiles(op) * len(term.taps) * chunks
            self.sums[op.index] = Sum(op, _parts(early, length), _parts(late, _LATE_CHUNKS), bias)

    @property
    def launches(self) -> int:
        """Of a step: of products that wait for nothing, of those of each further level, and of each stage; and before
        them the one that makes planes of what the last step left.
        """
        levels = self.program.levels
        products = any(one.early for one in self.sums.values()) + sum(bool(level.products) for level in levels[1:])
        return bool(self.work.shared) + products + sum(len(level.stages) for level in levels)

    def tiles(self, positions: int) -> ProductTiles:
        """Of the kernel of products, for steps of so many positions at most."""
        return product_tiles(self._precision, positions, self._capability)

    def chunks(self, term: Term) -> int:
        """Of the depth of one tap."""
        return -(-term.weight.shape[1] // self.depth)

    def packed_tiles(self, op: Op) -> int:
        """Of the columns of an operation."""
        return -(-op.channels // PACKED_COLUMNS)

    def _length(self, programs: int) -> int:
        """Chunks of an early part."""
        tiles, longest = 0, 1
        for op in self.made:
            depth = sum((len(term.taps) - self.work.waits(term)) * self.chunks(term) for term in op.terms)
            tiles += self.packed_tiles(op) * (depth > 0)
            longest = max(longest, depth)
        return max(_LEAST_CHUNKS, -(-longest // -(-programs // max(1, tiles))))


class FrontWeights:
    """What of some work does not depend on the batch.

    Args:
        programs: see `Cut`.

    Attributes:
        weights: bfloat16 tiles [planes, columns, depth]; for each term, block of columns and chunk of depth, in this
            order.
        params: float32: biases, and the tables of look-ups.
        taps: int64 [taps, 2]: rows and columns, of look-ups.
        draw: tiles of the kernel that draws.

    Raises:
        ArgumentError: weights that are not finite.
    """

    def __init__(self, work: Work, device: torch.device, precision: Precision, *, programs: int = PROGRAMS) -> None:
        require_finite(work.plan)
        self.work, self.plan, self.device = work, work.plan, device
        capability = hardware(device).capability
        self.cut = Cut(work, precision, programs=programs, capability=capability)
        self.draw = draw_tiles(work.plan.num_codes, capability)
        packed: list[Tensor] = []
        params: list[Tensor] = []
        taps: list[tuple[int, int]] = []
        for op in self.cut.made:
            if op.kind in ("affine", "lookup"):
                assert op.bias is not None
                params.append(op.bias)
            if op.weight is not None:
                params.append(op.weight.flatten())
                taps += op.taps
            packed += [self._packed(term) for term in op.terms]
        self.weights = torch.cat(packed).to(device) if packed else torch.empty(0, dtype=torch.bfloat16, device=device)
        self.params = torch.cat(params).to(device) if params else torch.empty(0, device=device)
        self.taps = torch.tensor(taps or [(0, 0)], dtype=torch.int64, device=device)

    def _packed(self, term: Term) -> Tensor:
        """[tiles, planes * columns * depth] of a tile each."""
        n, k = PACKED_COLUMNS, self.cut.depth
        _, depth, columns = term.weight.shape
        padded = torch.nn.functional.pad(term.weight, (0, -columns % n, 0, -depth % k))
        cut = (
            as_planes(padded, self.cut.planes).unflatten(3, (-1, n)).unflatten(2, (-1, k))
        )  # [P, T, chunks, k, tile, n]
        return cut.permute(4, 1, 2, 0, 5, 3).reshape(-1, self.cut.planes * n * k)


def as_planes(x: Tensor, planes: int) -> Tensor:
    """Float32 numbers as bfloat16: [planes, *x.shape], each what those before it leave of a number.

    Three have all bits of a number, and infinity in the last one; one is the number rounded.
    """
    parts = []
    for plane in range(planes):
        part = x.to(torch.bfloat16) if plane == planes - 1 else x.clamp(-_LARGEST, _LARGEST).to(torch.bfloat16)
        parts.append(part)
        x = x - part
    return torch.stack(parts)


def _segments(term: Term, weights: int, first: int, last: int) -> list[Segment]:
    return [Segment(term, weights, first, last)] if last > first else []


def _parts(segments: list[Segment], length: int) -> list[Part]:
    """Segments one after the other, cut into as many parts as there are lengths in them, of nearly equal length."""
    total = sum(one.last - one.first for one in segments)
    count = -(-total // length)
    ends = [number * total // count for number in range(1, count + 1)]
    parts: list[Part] = [[] for _ in ends]
    done = number = 0
    for term, weights, first, last in segments:
        while first < last:
            taken = min(last - first, ends[number] - done)
            parts[number].append(Segment(term, weights, first, first + taken))
            first, done = first + taken, done + taken
            number += done == ends[number]
    return parts
