"""What a row knows before it starts, in a few launches: the products of the front, for all positions of a row at once.

Everything that depends on rows above alone is worked out by the kernels that sample along a front
(`fastvq.kernels.front_product`, `fastvq.kernels.front_tail`), for rows in raster order. All products on rows above are
one launch, and what follows them another one; only priors that go through layers on rows above, as the gated PixelCNN's
vertical stack does, take some for each layer. The steps of a row find their caches and what they start from in the
memory of these kernels, so that nothing is copied.

Every output is summed in one order that does not depend on the batch. It has not yet run on a GPU, only in Triton's
interpreter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq.sampling.engines.front_launch import StepKernels
from fastvq.sampling.engines.front_tables import Layout, Sizes, static_sizes
from fastvq.sampling.engines.front_weights import PROGRAMS, Cut, FrontWeights
from fastvq.sampling.engines.front_work import Work
from fastvq.sampling.engines.state import SteadyState, common_bytes
from fastvq.sampling.options import Precision
from fastvq.sampling.plan.form import Plan, extent

# Row numbers lie as far apart as Triton asks for to compile one kernel for all.
_ALIGNED = 4


class RowProducts:
    """A plan's weights for its row phase, packed for a precision, and what operations without one start from.

    Args:
        programs: see `Cut`.
    """

    def __init__(self, plan: Plan, device: torch.device, precision: Precision, *, programs: int = PROGRAMS) -> None:
        self.plan, self.device = plan, device
        self.weights = FrontWeights(Work.rows(plan), device, precision, programs=programs)
        made = self.weights.work.made
        self.bias = {op.index: op.bias.to(device) for op in plan.ops if op.bias is not None and op.index not in made}


class ProductState(SteadyState):
    """Caches for a row phase by the products of the front."""

    def __init__(self, products: RowProducts, batch: int, statics: dict[str, Tensor]) -> None:
        super().__init__(products.plan, products.device, batch, statics)
        self.kernels = StepKernels(products.weights, batch, static_sizes(statics))
        layout, values = self.kernels.layout, self.kernels.values
        height, width = self.plan.shape
        numbers = torch.arange(height, dtype=torch.int32, device=self.device)
        self._numbers = numbers[:, None].expand(-1, _ALIGNED).contiguous()
        self._same = {index: bias.expand(batch, 1, -1) for index, bias in products.bias.items()}
        for index, first in layout.value_places.items():
            sizes = (batch, width, self.plan.ops[index].channels)
            self._same[index] = values[first : first + math.prod(sizes)].view(sizes)
        self.go_to(0)

    def begin(self, codes: Tensor) -> None:
        super().begin(codes)
        self.kernels.clear()
        self.kernels.put_statics(self.statics)

    def begin_row(self, row: int) -> None:
        self.go_to(row)
        self.kernels.enqueue(self._numbers[row], self.codes)

    def go_to(self, row: int) -> None:
        self.row, self.rows = row, dict(self._same)
        for index in self.kernels.layout.statics:
            grid = self.kernels.static(index)  # [B or 1, H or 1, W or 1, C]
            self.rows[index] = grid[:, row if grid.shape[1] > 1 else 0].expand(self.batch, -1, -1)

    def cache_row(self, index: int) -> Tensor:
        place, unit = self.kernels.layout.places[index], self.kernels.weights.cut.unit
        sizes = (self.batch, self.width, self.plan.ops[index].channels)
        first = place.base + self.row % place.rows * place.row
        return self.kernels.kept.as_strided(sizes, (place.sample * unit, place.col * unit, 1), first * unit)

    def cached_rows(self, index: int) -> int:
        return self.kernels.layout.places[index].rows


def row_launches(plan: Plan) -> int:
    """Of the row phase of a row."""
    return _cut(plan, "float32").launches


def product_bytes(plan: Plan, batch: int, precision: Precision) -> int:
    """Bytes of a `ProductState` and what goes with it: two places for the current position's vectors."""
    height, width = plan.shape
    sizes: dict[str, Sizes] = {"context": (batch, height, width), "label": (batch, 1, 1)}
    names = [op.variant for op in plan.ops if op.kind == "static"]
    statics = {name: sizes.get(extent(name), (1, height, width)) for name in names}
    layout = Layout(_cut(plan, precision), batch, statics)
    return batch * common_bytes(plan, places=2) + layout.bytes


def _cut(plan: Plan, precision: Precision) -> Cut:
    key = ("rows", precision)
    if key not in plan.remembered:
        plan.remembered[key] = Cut(Work.rows(plan), precision)
    found: Cut = plan.remembered[key]
    return found
