"""What a prior's writer notes its operations in, as the layers that priors are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvq.models.blocks import CodeConv2d, GatedBlock
from fastvq.sampling.plan.form import Op, Tap, Term

# A vector that the model concatenates from several is kept as its parts: (operations, in order).
Parts = tuple[int, ...]
Outputs = slice | list[int]
EVERY = slice(None)
HERE: tuple[Tap, ...] = ((0, 0),)


class Graph:
    """Operations so far, each known by its index."""

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
        """What :meth:`fastvq.models.Prior.statics` gives under this name."""
        return self.add_op(Op(self.next, "static", channels, variant=variant))

    def context_of(self, channels: int) -> int:
        """The features of condition and label."""
        if self.context is None:
            self.context = self.static("context" if self._spatial_context else "label", channels)
        return self.context

    def lookup(self, layer: CodeConv2d) -> int:
        return self.lookup_table(layer.taps, numbers(layer.weight), numbers(layer.bias))

    def lookup_table(self, taps: tuple[Tap, ...], weight: Tensor, bias: Tensor | None) -> int:
        """The sum over taps of a vector per code, weight [T, K, C]; taps of the position's row end at its neighbour."""
        channels = weight.shape[2]
        bias = weight.new_zeros(channels) if bias is None else bias
        return self.add_op(Op(self.next, "lookup", channels, taps=taps, weight=weight, bias=bias))

    def affine(self, terms: Sequence[Term], bias: Tensor | None) -> int:
        channels = terms[0].weight.shape[2]
        if bias is None:
            bias = torch.zeros(channels, dtype=torch.float32, device=terms[0].weight.device)
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

    def terms(
        self,
        parts: Parts,
        layer: nn.Module,
        variant: str | None = None,
        outputs: Outputs = EVERY,
        taps: tuple[Tap, ...] | None = None,
    ) -> list[Term]:
        """The terms of a convolution over activated, concatenated parts.

        Args:
            outputs: channels that are kept.
            taps: of a layer that does not say them itself, by an attribute ``taps``, and reads other places than the
                current one. Their bounding box begins at the first entry of the layer's kernel.
        """
        taps, weight = _kernel(layer, taps)
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

    def conv(self, layer: nn.Module, parts: Parts, taps: tuple[Tap, ...] | None = None) -> int:
        """A convolution over concatenated parts, bias included; see :meth:`terms`."""
        return self.affine(self.terms(parts, layer, taps=taps), numbers(layer.bias))

    def gated_block(self, block: GatedBlock, parts: Parts, *, context: bool = False, aux: int | None = None) -> Parts:
        """x + glu(conv2(act(conv1(act(x)) + aux)) + context), part by part."""
        kind = block.activation
        terms = self.terms(parts, block.conv1, kind)
        bias = numbers(block.conv1.bias)
        if block.aux is not None:
            assert aux is not None
            terms += self.terms((aux,), block.aux, kind)
            bias = bias + numbers(block.aux.bias)
        inner = self.affine(terms, bias)
        total, offset, out = sum(self.widths(parts)), 0, []
        for part, width in zip(parts, self.widths(parts), strict=True):
            content = list(range(offset, offset + width))
            outputs = content + [total + channel for channel in content]
            terms = self.terms((inner,), block.conv2, kind, outputs)
            if context and block.context is not None:
                source = self.context_of(block.context.in_channels)
                terms += self.terms((source,), block.context, None, outputs)
            gated = self.gate(self.affine(terms, numbers(block.conv2.bias)[outputs]), "glu")
            out.append(self.add(self.activation(part, kind) if block.legacy_skip else part, gated))
            offset += width
        return tuple(out)


def _kernel(layer: nn.Module, taps: tuple[Tap, ...] | None) -> tuple[tuple[Tap, ...], Tensor]:
    """Taps of a convolution and their weights [T, C_in, C_out]."""
    weight = numbers(layer.weight)
    read: tuple[Tap, ...] = getattr(layer, "taps", HERE) if taps is None else taps
    assert read != HERE or weight.shape[2:] == (1, 1)
    above, left = min(dr for dr, _ in read), min(dc for _, dc in read)
    chosen = torch.stack([weight[:, :, dr - above, dc - left] for dr, dc in read])  # [T, C_out, C_in]
    return read, chosen.transpose(1, 2).contiguous()


def numbers(parameter: object) -> Tensor:
    """A copy of a parameter in float32, as it is now."""
    assert isinstance(parameter, Tensor)
    return parameter.detach().float().clone()
