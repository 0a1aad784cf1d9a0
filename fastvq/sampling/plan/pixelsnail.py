"""PixelSNAIL as operations of a plan."""

from __future__ import annotations

from fastvq.models.blocks import GatedBlock, PointwiseConv2d
from fastvq.models.pixelsnail import AttentionBlock, PixelBlock, PixelSNAIL
from fastvq.sampling.plan.graph import Graph
from fastvq.sampling.plan.recognise import CODES, CONV, GATED, GATED_LIST, POINTWISE, Part
from fastvq.sampling.plan.writers import writes


@writes(
    PixelSNAIL,
    {
        PixelSNAIL: {
            "input": CODES,
            "blocks": Part((PixelBlock,), many=True),
            "output_blocks": GATED_LIST,
            "output": CONV,
        },
        PixelBlock: {
            "layers": GATED_LIST,
            "attention": Part((AttentionBlock,), optional=True),
            "mix": Part((PointwiseConv2d,), optional=True),
        },
        AttentionBlock: {
            "key_block": GATED,
            "query_block": GATED,
            "query": POINTWISE,
            "key": POINTWISE,
            "value": POINTWISE,
            "out_block": GATED,
        },
    },
    also=("_split", "background"),
)
def write(graph: Graph, prior: PixelSNAIL) -> int:
    kind = prior.config.activation
    background = graph.static("background", 2)
    x = graph.lookup(prior.input)
    for block in prior.blocks:
        assert isinstance(block, PixelBlock)
        features = x
        for layer in block.layers:
            assert isinstance(layer, GatedBlock)
            (features,) = graph.gated_block(layer, (features,), context=True)
        if block.attention is not None:
            seen = graph.activation(x, "elu") if block.keys_read_activated else x
            x = _attention(graph, block.attention, seen, features, background)
        else:
            assert block.mix is not None
            x = graph.conv(block.mix, (features, background))
    for block in prior.output_blocks:
        assert isinstance(block, GatedBlock)
        (x,) = graph.gated_block(block, (x,))
    return graph.conv(prior.output, (graph.activation(x, kind),))


def _attention(graph: Graph, block: AttentionBlock, x: int, features: int, background: int) -> int:
    sources = graph.gated_block(block.key_block, (x, features, background))
    asking = graph.gated_block(block.query_block, (features, background))
    found = graph.attention(
        graph.conv(block.query, asking),
        graph.conv(block.key, sources),
        graph.conv(block.value, sources),
        block.heads,
        block.mask,
    )
    return graph.gated_block(block.out_block, (features,), aux=found)[0]
