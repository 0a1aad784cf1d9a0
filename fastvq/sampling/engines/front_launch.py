"""Launches of the kernels for whole steps, and the memory that they read and write."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.kernels.front_tiles import PACKED_COLUMNS
from fastvq.sampling.engines.front_tables import Layout, Sizes, Tables
from fastvq.sampling.engines.front_weights import FrontWeights, as_planes
from fastvq.sampling.plan.evaluate import elementwise

# Numbers of a program that makes planes of them.
_BLOCK = 2048


class StepKernels:
    """What one micro-batch needs to have some work done, step by step.

    Args:
        sizes: see `Layout`.

    Attributes:
        features: what products read, bfloat16 [planes, numbers]; vectors are padded with zeros.
        kept: the same numbers in float32, which the steps of a row read and write; along a front it is empty.
        values, partials: float32, of the current step.
        launches: of a step, see `Tables`.
    """

    def __init__(self, weights: FrontWeights, batch: int, sizes: dict[str, Sizes]) -> None:
        self.weights, self.plan, self.device, self.batch = weights, weights.plan, weights.device, batch
        self.layout = Layout(weights.cut, batch, sizes)
        tables = Tables(self.layout)
        self.launches = tables.launches
        self._items, self._programs, self._instructions, self._chains, self._shared = (
            torch.tensor(table, dtype=torch.int64).to(self.device)
            for table in (tables.items, tables.programs, tables.instructions, tables.chains, tables.shared)
        )
        numbers, _ = self.layout.numbers
        self._longest = max((fields[4] for fields in tables.shared), default=0) * weights.cut.unit
        self.features = torch.zeros(weights.cut.planes, numbers, dtype=torch.bfloat16, device=self.device)
        self.kept = torch.zeros(numbers if weights.work.raster else 0, dtype=torch.float32, device=self.device)
        self.values = torch.empty(self.layout.values, dtype=torch.float32, device=self.device)
        self.partials = torch.empty(self.layout.partials, dtype=torch.float32, device=self.device)
        self._skew = 0 if weights.work.raster else self.plan.front(1).skew

    @property
    def bytes(self) -> int:
        """Of everything that this takes beside the weights."""
        tensors = (value for value in vars(self).values() if isinstance(value, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def clear(self) -> None:
        """Forget all features."""
        self.features.zero_()
        self.kept.zero_()

    def static(self, index: int) -> Tensor:
        """What is known beforehand of an operation, of rows in raster order: [B or 1, H or 1, W or 1, C]."""
        return self._static(index, self.kept)

    def _static(self, index: int, numbers: Tensor) -> Tensor:
        base, units, sizes = self.layout.statics[index]
        unit = self.weights.cut.unit
        place = numbers[base * unit :][: sizes[0] * sizes[1] * sizes[2] * units * unit]
        return place.view(*sizes, units * unit)[..., : self.plan.ops[index].channels]

    def put_statics(self, statics: dict[str, Tensor]) -> None:
        """Enqueue copies of what the prior is told, and what follows from it alone."""
        known: dict[int, Tensor] = {}
        for index in self.layout.statics:
            op = self.plan.ops[index]
            if op.kind == "static":
                known[index] = statics[op.variant].permute(0, 2, 3, 1)
            else:
                known[index] = elementwise(op, [known[source] for source in op.sources])
            for place, plane in zip(self.features, as_planes(known[index], len(self.features)), strict=True):
                self._static(index, place).copy_(plane)
            if self.kept.numel():
                self.static(index).copy_(known[index])

    def enqueue(self, step: Tensor, codes: Tensor) -> None:
        """Enqueue a step. ``step`` is int32 [1] in device memory, ``codes`` int64 [n, H, W]."""
        if len(self._shared):
            self._take_over(step)
        for kind, first, last in self.launches:
            if kind == "product":
                self._multiply(step, first, last)
            else:
                self._finish(step, codes, first, last)

    def _take_over(self, step: Tensor) -> None:
        from fastvq.kernels.front_planes import _planes_kernel

        _planes_kernel[(-(-self._longest // _BLOCK), self.batch, len(self._shared))](
            step, self.kept, self.features, self._shared, self.features.shape[1],
            UNIT=self.weights.cut.unit, PLANES=self.weights.cut.planes, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip

    def _multiply(self, step: Tensor, first: int, last: int) -> None:
        from fastvq.kernels.front_product import _product_kernel

        height, width = self.plan.shape
        tiles, weights = self.layout.tiles, self.weights
        _product_kernel[(self.layout.rows // tiles.block_m, last - first)](
            step, self.features, weights.weights, self.partials, self._items, self._programs[first:last],
            self.batch, self.features.shape[1],
            HEIGHT=height, WIDTH=width, SKEW=self._skew, PLANES=weights.cut.planes,
            INTERPRETED=self.device.type == "cpu", UNIT=weights.cut.unit, PACKED=PACKED_COLUMNS,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _finish(self, step: Tensor, codes: Tensor, first: int, last: int) -> None:
        from fastvq.kernels.front_tail import _tail_kernel

        height, width = self.plan.shape
        tiles, features = self.weights.cut.tail, self.features
        _tail_kernel[(-(-self.layout.capacity // tiles.block_m), last - first)](
            step, codes, features, self.kept if self.kept.numel() else None, self.partials, self.values,
            self.weights.params, self.weights.taps, self._instructions, self._chains[first:last],
            self.batch, self.layout.rows, self.plan.num_codes, features.shape[1],
            HEIGHT=height, WIDTH=width, SKEW=self._skew, PLANES=len(features), UNIT=self.weights.cut.unit,
            BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c, num_warps=tiles.warps,
        )  # fmt: skip
