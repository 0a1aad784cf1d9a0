"""Launches of the kernels for whole steps, and the memory that they read and write."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.sampling.engines.front_tables import Layout, Sizes, Tables
from fastvq.sampling.engines.front_weights import FrontWeights
from fastvq.sampling.engines.state import elementwise

# Of float32 products on tensor cores: six products of bfloat16 thirds, which together carry 24 bits.
FLOAT32_PRODUCTS = "bf16x6"


class StepKernels:
    """What one micro-batch needs to have some work done, step by step.

    Args:
        sizes, grouped: see `Layout`.

    Attributes:
        features: what products read; vectors are padded with zeros.
        values, partials: float32, of the current step.
        launches: of a step, see `Tables`.
    """

    def __init__(
        self, weights: FrontWeights, batch: int, sizes: dict[str, Sizes], *, grouped: bool | None = None
    ) -> None:
        self.weights, self.plan, self.device, self.batch = weights, weights.plan, weights.device, batch
        self.layout = Layout(weights.cut, batch, sizes, grouped=grouped)
        tables = Tables(self.layout)
        self.launches = tables.launches
        self._items, self._programs, self._instructions, self._chains = (
            torch.tensor(table, dtype=torch.int64).to(self.device)
            for table in (tables.items, tables.programs, tables.instructions, tables.chains)
        )
        numbers = self.layout.features * weights.cut.unit
        self.features = torch.zeros(numbers, dtype=weights.kept_as, device=self.device)
        self.values = torch.empty(self.layout.values, dtype=torch.float32, device=self.device)
        self.partials = torch.empty(self.layout.partials, dtype=torch.float32, device=self.device)
        self._skew = 0 if weights.work.raster else self.plan.front(1).skew

    @property
    def bytes(self) -> int:
        """Of everything that this takes beside the weights."""
        tensors = (value for value in vars(self).values() if isinstance(value, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def static(self, index: int) -> Tensor:
        """What is known beforehand of an operation: [B or 1, H or 1, W or 1, C], among the features."""
        base, units, sizes = self.layout.statics[index]
        unit = self.weights.cut.unit
        place = self.features[base * unit :][: sizes[0] * sizes[1] * sizes[2] * units * unit]
        return place.view(*sizes, units * unit)[..., : self.plan.ops[index].channels]

    def put_statics(self, statics: dict[str, Tensor]) -> None:
        """Enqueue copies of what the prior is told, and what follows from it alone."""
        for index in self.layout.statics:
            op = self.plan.ops[index]
            if op.kind == "static":
                self.static(index).copy_(statics[op.variant].permute(0, 2, 3, 1))
            else:
                self.static(index).copy_(elementwise(op, [self.static(source) for source in op.sources]))

    def enqueue(self, step: Tensor, codes: Tensor) -> None:
        """Enqueue a step. ``step`` is int32 [1] in device memory, ``codes`` int64 [n, H, W]."""
        for kind, first, last in self.launches:
            if kind == "product":
                self._multiply(step, first, last)
            else:
                self._finish(step, codes, first, last)

    def _multiply(self, step: Tensor, first: int, last: int) -> None:
        from fastvq.kernels.front_product import _product_kernel

        height, width = self.plan.shape
        tiles, weights = self.weights.cut.tiles, self.weights
        _product_kernel[(-(-self.layout.capacity // tiles.block_m), last - first)](
            step, self.features, weights.weights, self.partials, self._items, self._programs[first:last], self.batch,
            HEIGHT=height, WIDTH=width, SKEW=self._skew,
            PRECISION="interpreted" if self.device.type == "cpu" else FLOAT32_PRODUCTS,
            UNIT=weights.cut.unit, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _finish(self, step: Tensor, codes: Tensor, first: int, last: int) -> None:
        from fastvq.kernels.front_tail import _tail_kernel

        height, width = self.plan.shape
        tiles = self.weights.cut.tail
        _tail_kernel[(-(-self.layout.capacity // tiles.block_m), last - first)](
            step, codes, self.features, self.partials, self.values, self.weights.params, self.weights.taps,
            self._instructions, self._chains[first:last],
            self.batch, self.layout.capacity, self.plan.num_codes,
            HEIGHT=height, WIDTH=width, SKEW=self._skew, UNIT=self.weights.cut.unit,
            BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c, num_warps=tiles.warps,
        )  # fmt: skip
