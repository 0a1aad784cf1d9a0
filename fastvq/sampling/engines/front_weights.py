"""The weights of what kernels for whole steps work out, packed for their products, and how these are cut into parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.kernels.front_tiles import draw_tiles, product_tiles, tail_tiles
from fastvq.kernels.launch import hardware
from fastvq.sampling.engines.front_program import FrontProgram
from fastvq.sampling.engines.front_work import Work
from fastvq.sampling.options import Precision
from fastvq.sampling.plan.form import Op, Term, require_finite

# Programs that fill a large chip. It decides how sums are cut, so it is one number for all chips.
PROGRAMS = 264
# Of a part: shorter ones would spend more on adding up than on products.
_LEAST_CHUNKS = 2
# Tiles of positions from which on a group of parts in a program fills the chip.
_FILLING_TILES = 16


class Part(NamedTuple):
    """Some of the depth of a term: its chunks ``first`` to ``last - 1``, counted tap by tap."""

    term: Term
    weights: int
    first: int
    last: int


class Sum(NamedTuple):
    """An affine operation as parts, in the order of addition.

    Attributes:
        early: parts that read nothing of the position itself but what is known beforehand. They go in groups.
        group: of how many.
        late: the others, added one by one.
        bias: its place among the parameters.
    """

    op: Op
    early: list[Part]
    group: int
    late: list[Part]
    bias: int


class Cut:
    """How the sums of some work are cut, and where its weights lie. It depends on shapes alone, not on the batch.

    Args:
        programs: of a launch, that are wanted where there is one tile of positions. Bits depend on it.
        capability: compute capability of the GPU, such as 90.

    Attributes:
        tiles, tail: those of the two kernels.
        unit: numbers that places of features count in.
        sums: by operation.
        lookups: by operation: places of its bias, its table and its taps.
    """

    def __init__(self, work: Work, precision: Precision, *, programs: int = PROGRAMS, capability: int = 90) -> None:
        self.work, self.programs = work, programs
        self.tiles, self.tail = product_tiles(precision, capability), tail_tiles(capability)
        self.unit = math.gcd(self.tiles.block_k, *(work.ops[index].channels for index in work.shared))
        self.program = FrontProgram(work)
        self.made = [work.ops[index] for index in sorted(work.made)]
        self.sums: dict[int, Sum] = {}
        self.lookups: dict[int, tuple[int, int, int]] = {}
        part, groups = self._lengths()
        tiles = numbers = taps = 0
        for op in self.made:
            if op.kind not in ("affine", "lookup"):
                continue
            bias, numbers = numbers, numbers + op.channels
            if op.weight is not None:
                self.lookups[op.index] = (bias, numbers, taps)
                numbers, taps = numbers + op.weight.numel(), taps + len(op.taps)
                continue
            early: list[Part] = []
            late: list[Part] = []
            for term in op.terms:
                chunks = self.chunks(term)
                here = (len(term.taps) - work.waits(term)) * chunks
                early += _parts(term, tiles, 0, here, part)
                late += _parts(term, tiles, here, len(term.taps) * chunks, _LEAST_CHUNKS)
                tiles += self.column_tiles(op) * len(term.taps) * chunks
            self.sums[op.index] = Sum(op, early, max(1, -(-len(early) // groups)), late, bias)

    @property
    def launches(self) -> int:
        """Of a step: of products that wait for nothing, of those of each further level, and of each stage."""
        levels = self.program.levels
        products = any(one.early for one in self.sums.values()) + sum(bool(level.products) for level in levels[1:])
        return products + sum(len(level.stages) for level in levels)

    def chunks(self, term: Term) -> int:
        """Of the depth of one tap."""
        return -(-term.weight.shape[1] // self.tiles.block_k)

    def column_tiles(self, op: Op) -> int:
        return -(-op.channels // self.tiles.block_n)

    def _lengths(self) -> tuple[int, int]:
        """Chunks of an early part, and the number of groups: so that parts fill a chip with one tile of positions, and
        groups with many.
        """
        tiles, longest = 0, 1
        for op in self.made:
            depths = [(len(term.taps) - self.work.waits(term)) * self.chunks(term) for term in op.terms]
            tiles += self.column_tiles(op) * any(depths)
            longest = max([longest, *depths])
        wanted = -(-self.programs // max(1, tiles))
        return max(_LEAST_CHUNKS, -(-longest // wanted)), -(-self.programs // max(1, tiles * _FILLING_TILES))


class FrontWeights:
    """What of some work does not depend on the batch.

    Args:
        programs: see `Cut`.

    Attributes:
        weights: tiles [block_k, block_n]; for each term, block of columns and chunk of depth, in this order.
        params: float32: biases, and the tables of look-ups.
        taps: int64 [taps, 2]: rows and columns, of look-ups.
        draw: tiles of the kernel that draws.
        kept_as: the type of what products read. Along a front it is that of the weights. The steps of a row read and
            write float32.

    Raises:
        ArgumentError: weights that are not finite.
    """

    def __init__(self, work: Work, device: torch.device, precision: Precision, *, programs: int = PROGRAMS) -> None:
        require_finite(work.plan)
        self.work, self.plan, self.device = work, work.plan, device
        capability = hardware(device).capability
        self.cut = Cut(work, precision, programs=programs, capability=capability)
        self.draw = draw_tiles(work.plan.num_codes, capability)
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.kept_as = torch.float32 if work.raster else self.dtype
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
        self.weights = torch.cat(packed).to(device) if packed else torch.empty(0, dtype=self.dtype, device=device)
        self.params = torch.cat(params).to(device) if params else torch.empty(0, device=device)
        self.taps = torch.tensor(taps or [(0, 0)], dtype=torch.int64, device=device)

    def _packed(self, term: Term) -> Tensor:
        """[tiles, block_k * block_n]."""
        n, k = self.cut.tiles.block_n, self.cut.tiles.block_k
        _, depth, columns = term.weight.shape
        padded = torch.nn.functional.pad(term.weight, (0, -columns % n, 0, -depth % k)).to(self.dtype)
        cut = padded.unflatten(2, (-1, n)).unflatten(1, (-1, k))  # [T, chunks, k, columns / n, n]
        return cut.permute(3, 0, 1, 2, 4).reshape(-1, k * n)


def _parts(term: Term, weights: int, begin: int, end: int, length: int) -> Iterator[Part]:
    for first in range(begin, end, length):
        yield Part(term, weights, first, min(first + length, end))
