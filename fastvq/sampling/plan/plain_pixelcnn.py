"""The plain PixelCNN as operations of a plan."""

from __future__ import annotations

from torch import nn

from fastvq.models.blocks import CausalConv2d
from fastvq.models.plain_pixelcnn import PixelCNN
from fastvq.sampling.plan.graph import Graph
from fastvq.sampling.plan.recognise import CODES, Part
from fastvq.sampling.plan.writers import writes

_CAUSAL = (CausalConv2d,)


@writes(
    PixelCNN,
    {
        PixelCNN: {
            "input": CODES,
            "layers": Part(_CAUSAL, many=True),
            "contexts": Part((nn.Conv2d,), many=True),
            "output": Part(_CAUSAL),
        }
    },
)
def write(graph: Graph, prior: PixelCNN) -> int:
    h = graph.lookup(prior.input)
    contexts = list(prior.contexts)
    for index, layer in enumerate([*prior.layers, prior.output]):
        if contexts:
            projection = contexts[index]
            assert isinstance(projection, nn.Conv2d)
            told = graph.terms((graph.context_of(projection.in_channels),), projection)
            h = graph.add(h, graph.affine(told, None))
        h = graph.conv(layer, (graph.activation(h, "relu"),))
    return h
