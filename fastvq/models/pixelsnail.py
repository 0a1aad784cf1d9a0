"""PixelSNAIL prior: gated residual causal convolutions with interspersed attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import require_bool, require_choice, require_number, require_positive_int
from fastvq.errors import ArgumentError
from fastvq.models.blocks import (
    ACTIVATIONS,
    Activation,
    CausalConv2d,
    CodeConv2d,
    GatedBlock,
    causal_taps,
    pointwise,
)
from fastvq.models.limits import LARGEST, LARGEST_KERNEL, MOST_LAYERS
from fastvq.models.prior import Condition, Prior, PriorConfig
from fastvq.ops import causal_attention
from fastvq.ops.causal_conv.reference import activate
from fastvq.ops.grid import FORMS, MASKS, Form, Mask


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig(PriorConfig):
    """Residual gated causal convolutions with interspersed causal attention (Chen et al. 2017; Razavi et al. 2019).

    Other fields are those of :class:`PriorConfig`.

    Args:
        channels, residual_channels: width of the trunk and inner width of the gated blocks.
        kernel_size, form: causal kernel, see :func:`fastvq.ops.causal_conv2d`.
        mask: ``strict`` convolutions leave the current position out in every layer, ``inclusive`` ones only in the
            first. Attention follows the same mask.
        blocks, layers_per_block: each block is that many gated layers, then attention (or a 1 x 1 convolution).
        attention, attention_heads, attention_channels, attention_dropout: whether blocks end in attention; its number
            of heads, total width of keys and values (None: half of ``channels``) and dropout on its logits.
        output_blocks: 1 x 1 gated blocks before the logits.
        activation: ``elu`` or ``concat_elu``.
        legacy_skip: gated blocks add elu(x) instead of x, those of the conditioning stack and the output included, and
            attention keys read elu of their block's input if gated layers precede them. So compute models trained
            elsewhere with an ELU that overwrote what it was given: whatever read a tensor after the first gated block
            that took it found it activated. Concatenated inputs were copies, so that the block over keys activated
            once more without touching features and queries. For such models only; see :mod:`fastvq.interop`.
    """

    channels: int = 256
    residual_channels: int = 256
    kernel_size: int = 5
    form: Form = "rows"
    mask: Mask = "strict"
    blocks: int = 4
    layers_per_block: int = 4
    attention: bool = True
    attention_heads: int = 8
    attention_channels: int | None = None
    attention_dropout: float = 0.0
    output_blocks: int = 0
    activation: Activation = "elu"
    legacy_skip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "channels", "residual_channels", "attention_heads", maximum=LARGEST)
        self._require(require_positive_int, "blocks", maximum=MOST_LAYERS)
        self._require(require_positive_int, "layers_per_block", "output_blocks", minimum=0, maximum=MOST_LAYERS)
        self._require(require_positive_int, "kernel_size", minimum=2, maximum=LARGEST_KERNEL)
        self._require(require_choice, "form", choices=FORMS)
        self._require(require_choice, "mask", choices=MASKS)
        self._require(require_choice, "activation", choices=ACTIVATIONS)
        self._require(require_number, "attention_dropout", least=0, below=1)
        self._require(require_bool, "attention")
        self._require(require_bool, "legacy_skip")
        if self.legacy_skip and self.activation != "elu":
            raise ArgumentError(f"legacy_skip: expected activation 'elu' with it, got {self.activation!r}")
        self._require(require_positive_int, "attention_channels", optional=True, maximum=LARGEST)
        if self.attention and (self.attention_width < 1 or self.attention_width % self.attention_heads):
            raise ArgumentError(
                f"attention_channels: {self.attention_width} is not a multiple of {self.attention_heads} heads"
            )

    @property
    def least_tensors(self) -> int:
        return super().least_tensors + self.blocks * (self.layers_per_block + 1) + self.output_blocks

    @property
    def attention_width(self) -> int:
        """Total width of keys and values over all heads."""
        return self.channels // 2 if self.attention_channels is None else self.attention_channels


_TINY: dict[str, Any] = {
    "num_codes": 16,
    "channels": 16,
    "residual_channels": 16,
    "kernel_size": 3,
    "blocks": 1,
    "layers_per_block": 1,
    "attention_heads": 2,
    "dropout": 0.0,
    "condition_channels": 16,
    "condition_blocks": 1,
}


def _pair(name: str, side: int, channels: int, **fields: Any) -> dict[str, PixelSNAILConfig]:
    """Both priors of pictures of that many pixels a side, whose bottom codes are made of 4 x 4 of them."""
    top, bottom = (side // 8, side // 8), (side // 4, side // 4)
    fields |= {"num_codes": 512, "channels": channels, "residual_channels": channels, "condition_channels": channels}
    fields |= {"kernel_size": 3, "output_blocks": 2, "attention_heads": 4}
    return {
        f"{name}-top": PixelSNAILConfig(shape=top, **fields),
        f"{name}-bottom": PixelSNAILConfig(
            shape=bottom,
            level=1,
            attention=False,
            condition_shapes=(top,),
            condition_num_codes=(512,),
            condition_blocks=4,
            **fields,
        ),
    }


class PixelSNAIL(Prior):
    """A prior of gated residual causal convolutions with causal attention between them.

    Chen et al. 2017, in the form used by Razavi et al. 2019, section 3.2 and appendix.

    The first layer looks up the codes before the current position; ``blocks`` blocks of gated residual layers follow,
    each ending in causal attention or a 1 x 1 convolution that also sees the position in the grid; ``output_blocks``
    1 x 1 gated blocks precede the logits. Condition and label enter every gated layer.

    Args:
        config, fields: a configuration, or its fields as keywords, alone or to replace some.
    """

    config_class: ClassVar[type[PixelSNAILConfig]] = PixelSNAILConfig
    config: PixelSNAILConfig
    background: Tensor
    # The paper's follow the appendix of Razavi et al. 2019. There the top prior's 20 layers have attention after every
    # 5, which is 4 blocks of 5; FFHQ's middle prior has attention once, after all 20.
    presets: ClassVar[Mapping[str, PixelSNAILConfig]] = {
        "imagenet256-top": PixelSNAILConfig(
            shape=(32, 32),
            num_codes=512,
            num_classes=1000,
            channels=512,
            residual_channels=2048,
            layers_per_block=5,
            condition_channels=512,
            output_blocks=20,
            dropout=0.1,
            attention_dropout=0.1,
        ),
        "imagenet256-bottom": PixelSNAILConfig(
            shape=(64, 64),
            num_codes=512,
            num_classes=1000,
            level=1,
            channels=512,
            residual_channels=1024,
            layers_per_block=5,
            attention=False,
            condition_shapes=((32, 32),),
            condition_num_codes=(512,),
            condition_channels=512,
            condition_blocks=20,
            dropout=0.1,
        ),
        "ffhq1024-top": PixelSNAILConfig(
            shape=(32, 32),
            num_codes=512,
            channels=512,
            residual_channels=2048,
            layers_per_block=5,
            dropout=0.5,
            attention_dropout=0.5,
        ),
        "ffhq1024-mid": PixelSNAILConfig(
            shape=(64, 64),
            num_codes=512,
            level=1,
            channels=512,
            residual_channels=1024,
            blocks=1,
            layers_per_block=20,
            condition_shapes=((32, 32),),
            condition_num_codes=(512,),
            condition_channels=512,
            condition_blocks=8,
            dropout=0.3,
            attention_dropout=0.3,
        ),
        "ffhq1024-bottom": PixelSNAILConfig(
            shape=(128, 128),
            num_codes=512,
            level=2,
            channels=512,
            residual_channels=1024,
            blocks=1,
            layers_per_block=10,
            attention=False,
            condition_shapes=((32, 32), (64, 64)),
            condition_num_codes=(512, 512),
            condition_channels=512,
            condition_blocks=8,
            dropout=0.25,
        ),
        # Under the autoencoders of these names.
        **_pair("photos64", 64, 128, blocks=2),
        **_pair("photos128", 128, 192, blocks=3),
        **_pair("photos256", 256, 256, blocks=4),
        **_pair("emoji", 64, 80, blocks=2, num_classes=9),
        "digits-top": PixelSNAILConfig(
            shape=(2, 2),
            num_codes=128,
            num_classes=10,
            channels=64,
            residual_channels=64,
            kernel_size=3,
            blocks=1,
            layers_per_block=2,
            attention_heads=4,
            condition_channels=64,
            output_blocks=2,
            dropout=0.2,
        ),
        "digits-bottom": PixelSNAILConfig(
            shape=(4, 4),
            num_codes=128,
            num_classes=10,
            level=1,
            channels=64,
            residual_channels=64,
            kernel_size=3,
            blocks=1,
            layers_per_block=4,
            attention_heads=4,
            condition_channels=64,
            condition_blocks=2,
            output_blocks=2,
            dropout=0.2,
            condition_shapes=((2, 2),),
            condition_num_codes=(128,),
        ),
        "tiny-top": PixelSNAILConfig(shape=(2, 2), **_TINY),
        "tiny-bottom": PixelSNAILConfig(
            shape=(4, 4), level=1, condition_shapes=((2, 2),), condition_num_codes=(16,), **_TINY
        ),
    }

    def __init__(self, config: PixelSNAILConfig | None = None, **fields: Any) -> None:
        config = self.config_class.of(config, fields)
        super().__init__(config, legacy_skip=config.legacy_skip)
        width = config.channels
        # A kernel of 2 still needs a first layer that sees its neighbours on both sides, hence the odd size.
        self.input = CodeConv2d(config.num_codes, width, causal_taps(config.kernel_size | 1))
        self.blocks = nn.ModuleList([PixelBlock(config, self.context_channels) for _ in range(config.blocks)])
        self.output_blocks = nn.ModuleList(
            [_gated(config, width, config.residual_channels) for _ in range(config.output_blocks)]
        )
        widen = 2 if config.activation == "concat_elu" else 1
        self.output = nn.Conv2d(widen * width, config.num_codes, 1)
        self.register_buffer("background", _coordinates(*config.shape), persistent=False)

    def fill_unstored(self) -> None:
        self.background = _coordinates(*self.config.shape)

    def statics(self, condition: Condition, label: Tensor | None, *, batch: int) -> dict[str, Tensor]:
        return {"background": self.background.float(), **super().statics(condition, label, batch=batch)}

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
                _gated(config, width, config.residual_channels, conv=causal, context_channels=context_channels)
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
        self.key_block = _gated(config, 2 * width + 2, width)
        self.query_block = _gated(config, width + 2, width)
        self.query = pointwise(width + 2, inner)
        self.key = pointwise(2 * width + 2, inner)
        self.value = pointwise(2 * width + 2, inner)
        self.out_block = _gated(config, width, width, aux_channels=inner)

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


def _gated(config: PixelSNAILConfig, channels: int, hidden: int, **options: Any) -> GatedBlock:
    return GatedBlock(
        channels,
        hidden,
        dropout=config.dropout,
        activation=config.activation,
        legacy_skip=config.legacy_skip,
        **options,
    )


def _coordinates(height: int, width: int) -> Tensor:
    """float32 [1, 2, H, W]: (row - H/2) / H and (column - W/2) / W."""
    grid = torch.empty(1, 2, height, width, dtype=torch.float32)
    if grid.is_meta:
        return grid  # an outline; the first arithmetic on the meta device imports for seconds
    for axis, size in enumerate((height, width)):
        places = (torch.arange(size, dtype=torch.float32) - size / 2) / size
        grid[0, axis] = places[:, None] if axis == 0 else places
    return grid
