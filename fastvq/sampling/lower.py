"""What each prior computes, written as operations of a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvq.errors import UnavailableError
from fastvq.models.blocks import CausalConv2d, CodeConv2d, GatedBlock
from fastvq.models.pixelcnn import GatedLayer, GatedPixelCNN
from fastvq.models.pixelsnail import AttentionBlock, PixelBlock, PixelSNAIL
from fastvq.models.prior import Prior
from fastvq.sampling.plan import Op, Plan, Tap, Term, schedule
from fastvq.sampling.recognise import why_no_plan

# A vector that the model concatenates from several is kept as its parts: (operations, in order).
Parts = tuple[int, ...]


def compile_plan(prior: Prior) -> Plan:
    """The plan of a prior. Weights are copied in float32 as they are now.

    Raises:
        UnavailableError: something else than weights decides what this prior computes.
    """
    reason = why_no_plan(prior)
    if reason is not None:
        raise UnavailableError(reason)
    graph = _Graph(spatial_context=bool(prior.config.condition_shapes))
    with torch.no_grad():
        output = _pixelsnail(graph, prior) if isinstance(prior, PixelSNAIL) else _gated_pixelcnn(graph, prior)
    return schedule(graph.ops, output, prior.config.shape, prior.config.num_codes)


class _Graph:
    def __init__(self, *, spatial_context: bool) -> None:
        self.ops: list[Op] = []
        self._activations: dict[tuple[int, str], int] = {}
        self.context: int | None = None
        self._spatial_context = spatial_context

    def add_op(self, op: Op) -> int:
        self.ops.append(op)
        return op.index

    @property
    def next(self) -> int:
        return len(self.ops)

    def static(self, variant: str, channels: int) -> int:
        return self.add_op(Op(self.next, "static", channels, variant=variant))

    def context_of(self, channels: int) -> int:
        if self.context is None:
            self.context = self.static("context" if self._spatial_context else "label", channels)
        return self.context

    def lookup(self, layer: CodeConv2d) -> int:
        weight = _copy(layer.weight)
        return self.add_op(
            Op(self.next, "lookup", weight.shape[2], taps=layer.taps, weight=weight, bias=_copy(layer.bias))
        )

    def affine(self, terms: Sequence[Term], bias: Tensor | None) -> int:
        channels = terms[0].weight.shape[2]
        bias = torch.zeros(channels, dtype=torch.float32) if bias is None else bias
        return self.add_op(Op(self.next, "affine", channels, terms=tuple(terms), bias=bias))

    def activation(self, source: int, variant: str) -> int:
        key = (source, variant)
        if key not in self._activations:
            channels = self.ops[source].channels * (2 if variant == "concat_elu" else 1)
            self._activations[key] = self.add_op(Op(self.next, "activation", channels, (source,), variant))
        return self._activations[key]

    def add(self, a: int, b: int) -> int:
        return self.add_op(Op(self.next, "add", self.ops[a].channels, (a, b)))

    def gate(self, source: int, variant: str) -> int:
        return self.add_op(Op(self.next, "gate", self.ops[source].channels // 2, (source,), variant))

    def attention(self, query: int, key: int, value: int, heads: int, mask: str) -> int:
        channels = self.ops[value].channels
        return self.add_op(Op(self.next, "attention", channels, (query, key, value), mask, heads=heads))

    def widths(self, parts: Parts) -> list[int]:
        return [self.ops[part].channels for part in parts]

    def terms(self, parts: Parts, layer: nn.Module, variant: str | None, outputs: slice | list[int]) -> list[Term]:
        """The terms of a convolution over activated, concatenated parts, some of its outputs kept."""
        taps, weight = _kernel(layer)
        weight = weight[:, :, outputs]
        total = sum(self.widths(parts))
        terms, offset = [], 0
        for part, width in zip(parts, self.widths(parts), strict=True):
            rows = list(range(offset, offset + width))
            if variant == "concat_elu":
                rows += [total + row for row in rows]
            source = part if variant is None else self.activation(part, variant)
            terms.append(Term(source, taps, weight[:, rows].contiguous()))
            offset += width
        return terms

    def gated_block(self, block: GatedBlock, parts: Parts, *, context: bool = False, aux: int | None = None) -> Parts:
        """x + glu(conv2(act(conv1(act(x)) + aux)) + context), part by part."""
        every, kind = slice(None), block.activation
        terms = self.terms(parts, block.conv1, kind, every)
        bias = _copy(block.conv1.bias)
        if block.aux is not None:
            assert aux is not None
            terms += self.terms((aux,), block.aux, kind, every)
            bias = bias + _copy(block.aux.bias)
        inner = self.affine(terms, bias)
        total, offset, out = sum(self.widths(parts)), 0, []
        for part, width in zip(parts, self.widths(parts), strict=True):
            content = list(range(offset, offset + width))
            outputs = content + [total + channel for channel in content]
            terms = self.terms((inner,), block.conv2, kind, outputs)
            if context and block.context is not None:
                source = self.context_of(block.context.in_channels)
                terms += self.terms((source,), block.context, None, outputs)
            gated = self.gate(self.affine(terms, _copy(block.conv2.bias)[outputs]), "glu")
            out.append(self.add(self.activation(part, kind) if block.legacy_skip else part, gated))
            offset += width
        return tuple(out)

    def pointwise(self, layer: nn.Module, parts: Parts) -> int:
        return self.affine(self.terms(parts, layer, None, slice(None)), _copy(layer.bias))


def _pixelsnail(graph: _Graph, prior: PixelSNAIL) -> int:
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
            x = graph.pointwise(block.mix, (features, background))
    for block in prior.output_blocks:
        assert isinstance(block, GatedBlock)
        (x,) = graph.gated_block(block, (x,))
    return graph.pointwise(prior.output, (graph.activation(x, kind),))


def _attention(graph: _Graph, block: AttentionBlock, x: int, features: int, background: int) -> int:
    sources = graph.gated_block(block.key_block, (x, features, background))
    asking = graph.gated_block(block.query_block, (features, background))
    found = graph.attention(
        graph.pointwise(block.query, asking),
        graph.pointwise(block.key, sources),
        graph.pointwise(block.value, sources),
        block.heads,
        block.mask,
    )
    return graph.gated_block(block.out_block, (features,), aux=found)[0]


def _gated_pixelcnn(graph: _Graph, prior: Prior) -> int:
    assert isinstance(prior, GatedPixelCNN)
    vertical = graph.lookup(prior.input_vertical)
    before = graph.lookup(prior.input_horizontal)
    width = prior.config.channels
    for_v, for_h = list(range(2 * width)), list(range(2 * width, 4 * width))

    def context(layer: nn.Conv2d | None, outputs: list[int]) -> list[Term]:
        return [] if layer is None else graph.terms((graph.context_of(layer.in_channels),), layer, None, outputs)

    def plus(source: int, terms: list[Term], bias: Tensor | None) -> int:
        return graph.add(source, graph.affine(terms, bias)) if terms else source

    link = graph.terms((vertical,), prior.input_link, None, slice(None))
    v = graph.gate(plus(vertical, context(prior.input_context, for_v), None), "tanh")
    h = graph.gate(plus(before, link + context(prior.input_context, for_h), _copy(prior.input_link.bias)), "tanh")
    h = graph.pointwise(prior.input_merge, (h,))
    for layer in prior.layers:
        assert isinstance(layer, GatedLayer)
        every = slice(None)
        vertical = graph.affine(graph.terms((v,), layer.vertical, None, every), _copy(layer.vertical.bias))
        terms = graph.terms((h,), layer.horizontal, None, every) + graph.terms((vertical,), layer.link, None, every)
        terms += context(layer.context, for_h)
        gated = graph.gate(graph.affine(terms, _copy(layer.horizontal.bias) + _copy(layer.link.bias)), "tanh")
        v = graph.gate(plus(vertical, context(layer.context, for_v), None), "tanh")
        h = graph.add(h, graph.pointwise(layer.merge, (gated,)))
    hidden = graph.pointwise(prior.hidden, (graph.activation(h, "relu"),))
    return graph.pointwise(prior.output, (graph.activation(hidden, "relu"),))


def _kernel(layer: nn.Module) -> tuple[tuple[Tap, ...], Tensor]:
    """Valid taps of a convolution and their weights [T, C_in, C_out]."""
    weight = _copy(layer.weight)
    height, width = weight.shape[2:]
    if isinstance(layer, CausalConv2d):
        above = height - 1 if layer.form == "rows" else height // 2
        last = width // 2 + (layer.mask == "inclusive")
        rows = [(row, width) for row in range(above)] + [(above, last)]
        cells = [(row, column) for row, columns in rows for column in range(columns)]
        taps = tuple((row - above, column - width // 2) for row, column in cells)
    elif (height, width) == (1, 1):
        cells, taps = [(0, 0)], ((0, 0),)
    else:
        # The stacks of the gated PixelCNN: a full rectangle, or the end of the current row.
        reach = width // 2 if height > 1 else width - 1
        cells = [(row, column) for row in range(height) for column in range(width)]
        taps = tuple((row - height + 1, column - reach) for row, column in cells)
    chosen = torch.stack([weight[:, :, row, column] for row, column in cells])  # [T, C_out, C_in]
    return taps, chosen.transpose(1, 2).contiguous()


def _copy(parameter: object) -> Tensor:
    assert isinstance(parameter, Tensor)
    return parameter.detach().float().clone()
