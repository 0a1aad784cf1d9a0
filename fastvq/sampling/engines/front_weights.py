"""A plan's weights packed for the products of steps along a front, and how these are cut into parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.kernels.front_tiles import draw_tiles, product_tiles, tail_tiles
from fastvq.kernels.launch import hardware
from fastvq.sampling.engines.front_program import HERE, FrontProgram
from fastvq.sampling.options import Precision
from fastvq.sampling.plan.form import Op, Plan, Term, require_finite

# Programs that fill a large chip. It decides how sums are cut, so it is one number for all chips.
_PROGRAMS = 264
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


class FrontWeights:
    """What of a plan does not depend on the batch.

    Args:
        programs: of a launch, that are wanted where there is one tile of positions. Bits depend on it.

    Attributes:
        tiles, tail, draw: those of the three kernels.
        weights: tiles [block_k, block_n]; for each term, block of columns and chunk of depth, in this order.
        params: float32: biases, and the tables of look-ups.
        taps: int64 [taps, 2]: rows and columns, of look-ups.
        sums: by operation.
        lookups: by operation: places of its bias, its table and its taps.

    Raises:
        ArgumentError: weights that are not finite.
    """

    def __init__(self, plan: Plan, device: torch.device, precision: Precision, *, programs: int = _PROGRAMS) -> None:
        require_finite(plan)
        self.plan, self.device, self.programs = plan, device, programs
        self.program = FrontProgram(plan)
        capability = hardware(device).capability
        self.tiles, self.tail = product_tiles(precision, capability), tail_tiles(capability)
        self.draw = draw_tiles(plan.num_codes, capability)
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        packed: list[Tensor] = []
        params: list[Tensor] = []
        taps: list[tuple[int, int]] = []
        self.sums: dict[int, Sum] = {}
        self.lookups: dict[int, tuple[int, int, int]] = {}
        part, groups = self._cut()
        tiles = numbers = 0
        for op in plan.ops:
            if op.kind not in ("affine", "lookup"):
                continue
            assert op.bias is not None
            params.append(op.bias)
            bias, numbers = numbers, numbers + op.channels
            if op.weight is not None:
                self.lookups[op.index] = (bias, numbers, len(taps))
                params.append(op.weight.flatten())
                numbers += op.weight.numel()
                taps += op.taps
                continue
            early: list[Part] = []
            late: list[Part] = []
            for term in op.terms:
                packed.append(self._packed(term))
                here = (len(term.taps) - self._waits(term)) * self.chunks(term)
                early += _parts(term, tiles, 0, here, part)
                late += _parts(term, tiles, here, len(term.taps) * self.chunks(term), _LEAST_CHUNKS)
                tiles += len(packed[-1])
            self.sums[op.index] = Sum(op, early, max(1, -(-len(early) // groups)), late, bias)
        self.weights = torch.cat(packed).to(device)
        self.params = torch.cat(params).to(device)
        self.taps = torch.tensor(taps or [(0, 0)], dtype=torch.int64, device=device)

    def chunks(self, term: Term) -> int:
        """Of the depth of one tap."""
        return -(-term.weight.shape[1] // self.tiles.block_k)

    def column_tiles(self, op: Op) -> int:
        return -(-op.channels // self.tiles.block_n)

    def _waits(self, term: Term) -> bool:
        """Whether the last tap is the position itself, and what it reads is worked out in the same step."""
        return HERE in term.taps and self.plan.ops[term.source].kind != "static"

    def _cut(self) -> tuple[int, int]:
        """Chunks of an early part, and the number of groups: so that parts fill a chip with one tile of positions, and
        groups with many.
        """
        tiles, longest = 0, 1
        for op in self.plan.ops:
            depths = [(len(term.taps) - self._waits(term)) * self.chunks(term) for term in op.terms]
            tiles += self.column_tiles(op) * any(depths)
            longest = max([longest, *depths])
        wanted = -(-self.programs // max(1, tiles))
        return max(_LEAST_CHUNKS, -(-longest // wanted)), -(-self.programs // max(1, tiles * _FILLING_TILES))

    def _packed(self, term: Term) -> Tensor:
        """[tiles, block_k * block_n]."""
        n, k = self.tiles.block_n, self.tiles.block_k
        _, depth, columns = term.weight.shape
        padded = torch.nn.functional.pad(term.weight, (0, -columns % n, 0, -depth % k)).to(self.dtype)
        cut = padded.unflatten(2, (-1, n)).unflatten(1, (-1, k))  # [T, chunks, k, columns / n, n]
        return cut.permute(3, 0, 1, 2, 4).reshape(-1, k * n)


def _parts(term: Term, weights: int, begin: int, end: int, length: int) -> Iterator[Part]:
    for first in range(begin, end, length):
        yield Part(term, weights, first, min(first + length, end))
