"""PixelSNAIL prior: gated residual causal convolutions with interspersed attention."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.models.blocks import CausalConv2d, CodeConv2d, GatedBlock, causal_taps, pointwise
from fastvq.models.config import PixelSNAILConfig
from fastvq.models.prior import Prior
from fastvq.ops import causal_attention
from fastvq.ops.causal_conv.reference import activate


class PixelSNAIL(Prior):
    """Chen et al. 2017, in the form used by Razavi et al. 2019, section 3.2 and appendix.

    The first layer looks up the codes before the current position; ``blocks`` blocks of gated residual layers follow,
    each ending in causal attention or a 1 x 1 convolution that also sees the position in the grid; ``output_blocks``
    1 x 1 gated blocks precede the logits. Condition and label enter every gated layer.
    """

    config_class: ClassVar[type[PixelSNAILConfig]] = PixelSNAILConfig
    config: PixelSNAILConfig
    background: Tensor

    def __init__(self, config: PixelSNAILConfig) -> None:
        super().__init__(config)
        width = config.channels
        # A kernel of 2 still needs a first layer that sees its neighbours on both sides, hence the odd size.
        self.input = CodeConv2d(config.num_codes, width, causal_taps(config.kernel_size | 1))
        self.blocks = nn.ModuleList([PixelBlock(config, self.context_channels) for _ in range(config.blocks)])
        self.output_blocks = nn.ModuleList(
            [
                GatedBlock(
                    width,
                    config.residual_channels,
                    dropout=config.dropout,
                    activation=config.activation,
                    legacy_skip=config.legacy_skip,
                )
                for _ in range(config.output_blocks)
            ]
        )
        widen = 2 if config.activation == "concat_elu" else 1
        self.output = nn.Conv2d(widen * width, config.num_codes, 1)
        self.register_buffer("background", _coordinates(*config.shape), persistent=False)

    def fill_unstored(self) -> None:
        self.background = _coordinates(*self.config.shape)

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        codes = self.check_codes(codes)
        rows = codes.shape[1]
        x = self.input(codes)
        background = self.background[:, :, :rows].expand(codes.shape[0], -1, -1, -1).to(x.dtype)
        # Joined to features in another layout, all would be copied by every block.
        background = background.contiguous(memory_format=torch.channels_last)
        if context is not None:
            context = context[:, :, :rows]
        for block in self.blocks:
            x = block(x, background, context)
        for block in self.output_blocks:
            x = block(x)
        return self.output(activate(x, self.config.activation))


class PixelBlock(nn.Module):
    """Gated causal layers, then attention over all earlier positions or a 1 x 1 convolution."""

    def __init__(self, config: PixelSNAILConfig, context_channels: int) -> None:
        super().__init__()
        width = config.channels

        def causal(in_channels: int, out_channels: int) -> CausalConv2d:
            return CausalConv2d(in_channels, out_channels, config.kernel_size, mask=config.mask, form=config.form)

        self.layers = nn.ModuleList(
            [
                GatedBlock(
                    width,
                    config.residual_channels,
                    conv=causal,
                    context_channels=context_channels,
                    dropout=config.dropout,
                    activation=config.activation,
                    legacy_skip=config.legacy_skip,
                )
                for _ in range(config.layers_per_block)
            ]
        )
        # The first gated layer of an in-place model has overwritten the input by the time that keys read it.
        self.keys_read_activated = config.legacy_skip and config.layers_per_block > 0
        self.attention = AttentionBlock(config) if config.attention else None
        self.mix = None if config.attention else pointwise(width + 2, width)

    def forward(self, x: Tensor, background: Tensor, context: Tensor | None) -> Tensor:
        features = x
        for layer in self.layers:
            features = layer(features, context)
        if self.attention is not None:
            return self.attention(F.elu(x) if self.keys_read_activated else x, features, background)
        assert self.mix is not None
        return self.mix(torch.cat([features, background], dim=1))


class AttentionBlock(nn.Module):
    """Keys and values from the block's input, its features and the position; queries from features and position."""

    def __init__(self, config: PixelSNAILConfig) -> None:
        super().__init__()
        width, inner = config.channels, config.attention_width
        self.mask, self.heads, self.dropout = config.mask, config.attention_heads, config.attention_dropout

        def gated(channels: int, aux_channels: int = 0) -> GatedBlock:
            return GatedBlock(
                channels,
                width,
                aux_channels=aux_channels,
                dropout=config.dropout,
                activation=config.activation,
                legacy_skip=config.legacy_skip,
            )

        self.key_block = gated(2 * width + 2)
        self.query_block = gated(width + 2)
        self.query = pointwise(width + 2, inner)
        self.key = pointwise(2 * width + 2, inner)
        self.value = pointwise(2 * width + 2, inner)
        self.out_block = gated(width, inner)

    def forward(self, x: Tensor, features: Tensor, background: Tensor) -> Tensor:
        sources = self.key_block(torch.cat([x, features, background], dim=1))
        asking = self.query_block(torch.cat([features, background], dim=1))
        heads = [self._split(t) for t in (self.query(asking), self.key(sources), self.value(sources))]
        dropout = self.dropout if self.training else 0.0
        found = causal_attention(*heads, mask=self.mask, dropout=dropout)
        # Channels-last, as the features are.
        image = found.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.out_block(features, aux=image)

    def _split(self, x: Tensor) -> Tensor:
        """[B, heads * D, H, W] to [B, heads, H * W, D]."""
        return x.flatten(2).unflatten(1, (self.heads, x.shape[1] // self.heads)).transpose(2, 3)


def _coordinates(height: int, width: int) -> Tensor:
    """float32 [1, 2, H, W]: (row - H/2) / H and (column - W/2) / W."""
    grid = torch.empty(1, 2, height, width, dtype=torch.float32)
    if grid.is_meta:
        return grid  # an outline; the first arithmetic on the meta device imports for seconds
    for axis, size in enumerate((height, width)):
        places = (torch.arange(size, dtype=torch.float32) - size / 2) / size
        grid[0, axis] = places[:, None] if axis == 0 else places
    return grid
