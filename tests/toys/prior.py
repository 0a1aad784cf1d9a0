"""A prior from outside the package: its class, and how a plan of it is written.

Two layers of strict causal convolution behind a look-up, and a learned vector for each row and each column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvq.models import Prior, PriorConfig
from fastvq.models.blocks import CausalConv2d, CodeConv2d, causal_taps
from fastvq.models.prior import Condition
from fastvq.sampling.plan import Graph, Part, writes


@dataclass(frozen=True)
class ToyConfig(PriorConfig):
    channels: int = 8
    layers: int = 2


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig, context_channels: int) -> None:
        super().__init__()
        self.conv = CausalConv2d(config.channels, 2 * config.channels, 3, mask="strict", form="rows")
        self.context = nn.Conv2d(context_channels, 2 * config.channels, 1) if context_channels else None

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.conv(x)
        if self.context is not None:
            h = h + self.context(context)
        content, gate = h.chunk(2, dim=1)
        return x + torch.tanh(content) * torch.sigmoid(gate)


class ToyPrior(Prior):
    config_class = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        height, width = config.shape
        self.input = CodeConv2d(config.num_codes, config.channels, causal_taps(3))
        self.rows = nn.Parameter(torch.randn(config.channels, height, 1))
        self.columns = nn.Parameter(torch.randn(config.channels, 1, width))
        self.places = nn.Conv2d(config.channels, config.channels, 1)
        self.layers = nn.ModuleList([ToyLayer(config, self.context_channels) for _ in range(config.layers)])
        self.output = nn.Conv2d(config.channels, config.num_codes, 1)

    def grid(self) -> Tensor:
        return (self.rows + self.columns)[None]

    def statics(self, condition: Condition, label: Tensor | None, *, batch: int) -> dict[str, Tensor]:
        return {"grid": self.grid().float(), **super().statics(condition, label, batch=batch)}

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        rows = codes.shape[1]
        x = self.input(self.check_codes(codes)) + self.places(self.grid()[:, :, :rows])
        for layer in self.layers:
            x = layer(x, None if context is None else context[:, :, :rows])
        return self.output(x)


@writes(
    ToyPrior,
    {
        ToyPrior: {
            "input": Part((CodeConv2d,)),
            "places": Part((nn.Conv2d,)),
            "layers": Part((ToyLayer,), many=True),
            "output": Part((nn.Conv2d,)),
        },
        ToyLayer: {"conv": Part((CausalConv2d,)), "context": Part((nn.Conv2d,), optional=True)},
    },
    also=("grid",),
)
def write(graph: Graph, prior: ToyPrior) -> int:
    places = graph.conv(prior.places, (graph.static("grid", prior.config.channels),))
    x = graph.add(graph.lookup(prior.input), places)
    for layer in prior.layers:
        h = graph.conv(layer.conv, (x,))
        if layer.context is not None:
            h = graph.add(h, graph.conv(layer.context, (graph.context_of(layer.context.in_channels),)))
        x = graph.add(x, graph.gate(h, "tanh"))
    return graph.conv(prior.output, (x,))
