"""The gated PixelCNN as operations of a plan."""

from __future__ import annotations

from torch import Tensor, nn

from fastvq.models.pixelcnn import GatedLayer, GatedPixelCNN
from fastvq.sampling.plan.form import Term
from fastvq.sampling.plan.graph import Graph, numbers
from fastvq.sampling.plan.recognise import CODES, CONV, MAYBE_CONV, Part
from fastvq.sampling.plan.writers import writes


@writes(
    GatedPixelCNN,
    {
        GatedPixelCNN: {
            "input_vertical": CODES,
            "input_horizontal": CODES,
            "input_link": CONV,
            "input_merge": CONV,
            "input_context": MAYBE_CONV,
            "layers": Part((GatedLayer,), many=True),
            "hidden": CONV,
            "output": CONV,
        },
        GatedLayer: {"vertical": CONV, "horizontal": CONV, "link": CONV, "merge": CONV, "context": MAYBE_CONV},
    },
    also=("vertical_taps", "horizontal_taps"),
)
def write(graph: Graph, prior: GatedPixelCNN) -> int:
    vertical = graph.lookup(prior.input_vertical)
    before = graph.lookup(prior.input_horizontal)
    width = prior.config.channels
    for_v, for_h = list(range(2 * width)), list(range(2 * width, 4 * width))

    def context(layer: nn.Conv2d | None, outputs: list[int]) -> list[Term]:
        return [] if layer is None else graph.terms((graph.context_of(layer.in_channels),), layer, outputs=outputs)

    def plus(source: int, terms: list[Term], bias: Tensor | None) -> int:
        return graph.add(source, graph.affine(terms, bias)) if terms else source

    link = graph.terms((vertical,), prior.input_link)
    v = graph.gate(plus(vertical, context(prior.input_context, for_v), None), "tanh")
    h = graph.gate(plus(before, link + context(prior.input_context, for_h), numbers(prior.input_link.bias)), "tanh")
    h = graph.conv(prior.input_merge, (h,))
    for layer in prior.layers:
        assert isinstance(layer, GatedLayer)
        vertical = graph.conv(layer.vertical, (v,), layer.vertical_taps)
        terms = graph.terms((h,), layer.horizontal, taps=layer.horizontal_taps) + graph.terms((vertical,), layer.link)
        terms += context(layer.context, for_h)
        gated = graph.gate(graph.affine(terms, numbers(layer.horizontal.bias) + numbers(layer.link.bias)), "tanh")
        v = graph.gate(plus(vertical, context(layer.context, for_v), None), "tanh")
        h = graph.add(h, graph.conv(layer.merge, (gated,)))
    hidden = graph.conv(prior.hidden, (graph.activation(h, "relu") if prior.config.output_activation else h,))
    return graph.conv(prior.output, (graph.activation(hidden, "relu"),))
