"""What a prior is told beforehand, every sum of it in one fixed order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq import _engine
from fastvq._memory import strided_address
from fastvq._product import Product
from fastvq.models.blocks import CodeConv2d, GatedBlock
from fastvq.models.prior import ContextEncoder, Prior
from fastvq.sampling.engines.prepared import Kept, prepared
from fastvq.sampling.plan.recognise import CODES_LIST, CONV, GATED_LIST, Known, Part, difference
from fastvq.sampling.request import SampleRequest

# Positions for which it pays to read a layer's weights, and whose features still lie in a cache.
_POSITIONS = 1024

_KNOWN = Known(
    {
        ContextEncoder: {"inputs": CODES_LIST, "blocks": GATED_LIST, "label": Part((nn.Embedding,), optional=True)},
        GatedBlock: {"conv1": CONV, "conv2": CONV},
        nn.Embedding: {},
    },
    also=(),
    free=("padding",),
)


def fixed_statics(prior: Prior, request: SampleRequest, kept: Kept | None = None) -> dict[str, Tensor]:
    """What is known before the first position, by name, as :meth:`fastvq.models.Prior.statics` gives it.

    Features of a sample depend neither on the other samples nor on the number of threads; and those of ``avx2`` and
    ``avx512`` are equal. A context encoder that something else than its weights decides on (it is overridden, hooked or
    built otherwise) runs as it is, sample by sample on one thread: that does not depend on the batch or on threads
    either, but on the instruction set it may.

    Args:
        prior: in evaluation mode, on the CPU.
        kept: what `prepared` gives of the prior; to be given where ``prior`` is a copy of the one that was prepared.

    Returns:
        float32 [B or 1, C, H or 1, W or 1].

    Raises:
        UnavailableError: there is no compiled extension, or no plan of this prior.
    """
    encoder, batch = prior.context_encoder, len(request.noise)
    if batch == 0 or (encoder is None and not request.condition):
        return prior.statics(request.condition, request.label, batch=batch)
    if encoder is None:
        return _one_by_one(prior, request, batch)
    weights, kernel = None, prior.config.condition_kernel
    if _unchanged(encoder, kernel):
        kept = prepared(prior) if kept is None else kept
        weights = kept.get("context", None, lambda: _pack(encoder, kernel))
    if weights is None:
        return _one_by_one(prior, request, batch)
    told = copy.copy(prior)
    told._modules = {**prior._modules, "context_encoder": _FixedContext(encoder, weights, kernel // 2)}
    return told.statics(request.condition, request.label, batch=batch)


def _unchanged(encoder: ContextEncoder, kernel: int) -> bool:
    if difference(encoder, (ContextEncoder,), "context_encoder", _KNOWN) is not None:
        return False
    reach = (kernel // 2, kernel // 2)
    convs = [conv for block in _blocks(encoder) for conv in (block.conv1, block.conv2)]
    return all(block.activation == "elu" for block in _blocks(encoder)) and all(conv.padding == reach for conv in convs)


def _blocks(encoder: ContextEncoder) -> list[GatedBlock]:
    return [block for block in encoder.blocks if isinstance(block, GatedBlock)]


def _one_by_one(prior: Prior, request: SampleRequest, batch: int) -> dict[str, Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = [request.rows(torch.tensor([sample], device="cpu")) for sample in range(batch)]
        found = [prior.statics(one.condition, one.label, batch=1) for one in single]
    finally:
        torch.set_num_threads(threads)
    return {name: torch.cat([features[name] for features in found]) for name in found[0]}


class _Table(NamedTuple):
    """A convolution of codes.

    Attributes:
        vectors: [T * K + 1, C], the last one zero.
    """

    vectors: Tensor
    taps: Sequence[tuple[int, int]]
    bias: Tensor

    def __call__(self, codes: Tensor) -> Tensor:
        """[B, H, W, C]: the taps' vectors added one after the other, then the bias; zero for taps outside the grid."""
        height, width = codes.shape[1:]
        nothing = len(self.vectors) - 1
        num_codes = nothing // len(self.taps)
        reach = max(max(abs(row), abs(column)) for row, column in self.taps)
        padded = F.pad(codes, (reach, reach, reach, reach), value=-1)
        total: Tensor | None = None
        for tap, (row, column) in enumerate(self.taps):
            here = padded[:, reach + row : reach + row + height, reach + column : reach + column + width]
            found = F.embedding(torch.where(here < 0, nothing, here + tap * num_codes), self.vectors)
            total = found if total is None else total.add_(found)
        assert total is not None
        return total.add_(self.bias)


class _Conv(NamedTuple):
    """A convolution that keeps the size of a grid."""

    product: Product
    bias: Tensor | None

    def __call__(self, x: _Padded, out: Tensor) -> None:
        self.product([x.windows], out, self.bias)


class _Weights(NamedTuple):
    """What is packed of a context encoder: the look-ups of its levels, and the two convolutions of its blocks."""

    tables: tuple[_Table, ...]
    convs: tuple[tuple[_Conv, _Conv], ...]


def _pack(encoder: ContextEncoder, kernel: int) -> _Weights | None:
    """None if convolutions do not have the sizes that go with the grid and the width of features."""
    tables = []
    for layer in encoder.inputs:
        assert isinstance(layer, CodeConv2d)
        vectors = layer.weight.detach().float().flatten(0, 1)
        vectors = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        tables.append(_Table(vectors, layer.taps, layer.bias.detach().float().clone()))
    convs = []
    for block in _blocks(encoder):
        pair = []
        for conv, factor in ((block.conv1, 1), (block.conv2, 2)):
            assert isinstance(conv, nn.Conv2d)
            weight, channels = conv.weight.detach().float(), tables[0].vectors.shape[1]
            if weight.shape != (factor * channels, channels, kernel, kernel):
                return None
            bias = None if conv.bias is None else conv.bias.detach().float().clone()
            pair.append(_Conv(Product([weight.permute(2, 3, 1, 0)]), bias))
        convs.append((pair[0], pair[1]))
    return _Weights(tuple(tables), tuple(convs))


class _FixedContext(nn.Module):
    """A context encoder whose sums are in a fixed order."""

    def __init__(self, encoder: ContextEncoder, weights: _Weights, reach: int) -> None:
        super().__init__()
        self.encoder, self._weights, self._reach = encoder, weights, reach

    def forward(self, condition: Sequence[Tensor], label: Tensor | None) -> Tensor | None:
        """See :class:`fastvq.models.prior.ContextEncoder`; channels last."""
        encoder = self.encoder
        features = self._features(condition) if condition else None
        if encoder.label is not None and label is not None:
            vector = encoder.label(label)[:, :, None, None].float()
            features = vector if features is None else features.add_(vector)
        return features

    def _features(self, condition: Sequence[Tensor]) -> Tensor:
        batch, height, width = condition[-1].shape
        bias = self._weights.tables[-1].bias
        made = bias.new_empty(batch, *self.encoder.shape, len(bias)).movedim(-1, 1)
        together = max(1, _POSITIONS // (height * width))
        for first in range(0, batch, together):
            part = slice(first, first + together)
            features = self._residual(self._joined([codes[part] for codes in condition]))
            made[part] = F.interpolate(features.movedim(-1, 1), size=self.encoder.shape, mode="nearest")
        return made

    def _joined(self, condition: Sequence[Tensor]) -> Tensor:
        """[B, h, w, C] on the finest grid."""
        features: Tensor | None = None
        for table, codes in zip(self._weights.tables, condition, strict=True):
            coarse, features = features, table(codes)
            if coarse is not None:
                size = features.shape[1:3]
                features.add_(F.interpolate(coarse.movedim(-1, 1), size=size, mode="nearest").movedim(1, -1))
        assert features is not None
        return features

    def _residual(self, features: Tensor) -> Tensor:
        """The stack of blocks on [B, h, w, C]."""
        if not self._weights.convs:
            return features
        samples, height, width, channels = features.shape
        first, second = _Padded(features, self._reach), _Padded(features, self._reach)
        kept = features.new_zeros(samples, height + self._reach, width, channels)
        kept[:, :height] = features
        rows = len(first.inside)
        trunk = kept.view(-1, width, channels)[:rows]
        wide = features.new_empty(rows, width, 2 * channels)
        # As rows of whole lines, or of single positions where halves lie apart.
        lines, outer, inner = trunk.view(rows, -1), first.inside.view(rows, -1), second.inside.view(rows, -1)
        points, (content, gate) = trunk.view(-1, channels), wide.view(-1, 2 * channels).split(channels, dim=1)
        for block, (conv1, conv2) in zip(_blocks(self.encoder), self._weights.convs, strict=True):
            if block.legacy_skip:
                _elementwise("elu", [lines], lines)
                first.inside.copy_(trunk)
            else:
                _elementwise("elu", [lines], outer)
            first.separate()
            conv1(first, second.inside)
            _elementwise("elu", [inner], inner)
            second.separate()
            conv2(second, wide)
            _elementwise("glu", [content, gate], content)
            _elementwise("add", [points, content], points)
        return kept[:, :height]


class _Padded:
    """Room for the grids of some samples one below the other, channels last, with zeros around and between them.

    Args:
        like: [B, h, w, C].
        reach: rows and columns of zeros on each side; two grids have theirs in common.

    Attributes:
        inside: [rows, w, C], from the first grid's first row to the last one's last, rows between grids among them.
        windows: [rows, 2 reach + 1, w + 2 reach, C], what a convolution reads for each of these rows.
    """

    def __init__(self, like: Tensor, reach: int) -> None:
        samples, height, width, channels = like.shape
        step, pitch = height + reach, (width + 2 * reach) * channels
        rows = samples * step - reach
        data = like.new_zeros(rows + 2 * reach, width + 2 * reach, channels)
        self.inside = data[reach : reach + rows, reach : reach + width]
        self.windows = data.as_strided((rows, 2 * reach + 1, width + 2 * reach, channels), (pitch, pitch, channels, 1))
        self._between = data[reach:].view(samples, step, -1, channels)[:-1, height:]

    def separate(self) -> None:
        """Put zeros between the grids, where results of whole rows have been written."""
        self._between.zero_()


def _elementwise(kind: str, inputs: Sequence[Tensor], out: Tensor) -> None:
    """Fill ``out`` [rows, channels] with a function of one or two inputs of that shape, of which it may be one."""
    fields: list[int] = []
    for x in inputs:
        fields += (strided_address("input", x, torch.float32, out.shape), x.stride(0))
    if len(inputs) == 1:
        fields += (0, 0)
    place = strided_address("out", out, torch.float32, out.shape)
    _engine.require().elementwise(kind, *fields, place, out.stride(0), *out.shape, torch.get_num_threads(), "auto")
