"""Gated PixelCNN prior: two stacks, so that no earlier position is in a blind spot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import require_bool, require_odd, require_positive_int
from fastvq._config import ADDED
from fastvq.models.blocks import CodeConv2d
from fastvq.models.limits import LARGEST, LARGEST_KERNEL, MOST_LAYERS
from fastvq.models.prior import Prior, PriorConfig


@dataclass(frozen=True, kw_only=True)
class GatedPixelCNNConfig(PriorConfig):
    """Gated PixelCNN with a vertical and a horizontal stack (van den Oord et al. 2016).

    Other fields are those of :class:`PriorConfig`.

    Args:
        channels: width of both stacks.
        layers: gated layers after the first.
        kernel_size: odd; the vertical stack reads k // 2 + 1 rows of k columns.
        input_kernel_size: of the first layer, odd; None: as the others.
        output_channels: width of the 1 x 1 layer before the logits.
        output_activation: whether a ReLU comes before that layer, as in the paper, and not only after it.
    """

    channels: int = 64
    layers: int = 15
    kernel_size: int = 3
    input_kernel_size: int | None = field(default=None, metadata=ADDED)
    output_channels: int = 512
    output_activation: bool = field(default=True, metadata=ADDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "channels", "output_channels", maximum=LARGEST)
        self._require(require_positive_int, "layers", minimum=0, maximum=MOST_LAYERS)
        self._require(require_odd, "kernel_size", minimum=3, maximum=LARGEST_KERNEL)
        if self.input_kernel_size is not None:
            self._require(require_odd, "input_kernel_size", minimum=3, maximum=LARGEST_KERNEL)
        self._require(require_bool, "output_activation")

    @property
    def least_tensors(self) -> int:
        return super().least_tensors + self.layers


class GatedPixelCNN(Prior):
    """A prior of two stacks of gated masked convolutions, so that no earlier position is in a blind spot.

    van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2 and figure 2.

    The vertical stack reads the rows above, the horizontal stack the current row up to the current position and, at
    the same position, the vertical stack. Only the first layer leaves the current code out, which is what makes every
    later layer free to read the current position.

    Args:
        config, fields: a configuration, or its fields as keywords, alone or to replace some.
    """

    config_class: ClassVar[type[GatedPixelCNNConfig]] = GatedPixelCNNConfig
    config: GatedPixelCNNConfig
    presets: ClassVar[Mapping[str, GatedPixelCNNConfig]] = {
        # van den Oord et al. 2017, section 4.1, see `fastvq.models.vqvae`.
        "imagenet128-pixelcnn": GatedPixelCNNConfig(
            shape=(32, 32), num_codes=512, num_classes=1000, channels=256, kernel_size=5
        ),
        "tiny-pixelcnn": GatedPixelCNNConfig(
            shape=(4, 4),
            num_codes=16,
            channels=16,
            layers=2,
            output_channels=16,
            dropout=0.0,
            condition_channels=16,
            condition_blocks=1,
        ),
    }

    def __init__(self, config: GatedPixelCNNConfig | None = None, **fields: Any) -> None:
        config = self.config_class.of(config, fields)
        super().__init__(config)
        width, reach = config.channels, (config.input_kernel_size or config.kernel_size) // 2
        above = [(row, column) for row in range(-reach, 0) for column in range(-reach, reach + 1)]
        before = [(0, column) for column in range(-reach, 0)]
        self.input_vertical = CodeConv2d(config.num_codes, 2 * width, above)
        self.input_horizontal = CodeConv2d(config.num_codes, 2 * width, before)
        self.input_link = nn.Conv2d(2 * width, 2 * width, 1)
        self.input_merge = nn.Conv2d(width, width, 1)
        self.input_context = _context_projection(self.context_channels, width)
        self.layers = nn.ModuleList([GatedLayer(config, self.context_channels) for _ in range(config.layers)])
        self.hidden = nn.Conv2d(width, config.output_channels, 1)
        self.output = nn.Conv2d(config.output_channels, config.num_codes, 1)

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        codes = self.check_codes(codes)
        if context is not None:
            context = context[:, :, : codes.shape[1]]
        vertical = self.input_vertical(codes)
        horizontal = self.input_horizontal(codes) + self.input_link(vertical)
        for_vertical, for_horizontal = _project(self.input_context, context)
        v = _gate(vertical + for_vertical)
        h = self.input_merge(_gate(horizontal + for_horizontal))
        for layer in self.layers:
            v, h = layer(v, h, context)
        return self.output(F.relu(self.hidden(F.relu(h) if self.config.output_activation else h)))


class GatedLayer(nn.Module):
    """One step of both stacks; the horizontal one is residual."""

    def __init__(self, config: GatedPixelCNNConfig, context_channels: int) -> None:
        super().__init__()
        width, self.reach = config.channels, config.kernel_size // 2
        self.dropout = config.dropout
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + 1, config.kernel_size))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach + 1))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.merge = nn.Conv2d(width, width, 1)
        self.context = _context_projection(context_channels, width)

    @property
    def vertical_taps(self) -> tuple[tuple[int, int], ...]:
        """Offsets (rows, columns) that ``vertical`` reads: its features are those of the rows above."""
        reach = self.reach
        return tuple((row, column) for row in range(-reach, 1) for column in range(-reach, reach + 1))

    @property
    def horizontal_taps(self) -> tuple[tuple[int, int], ...]:
        return tuple((0, column) for column in range(-self.reach, 1))

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        reach = self.reach
        vertical = self.vertical(F.pad(v, (reach, reach, reach, 0)))
        horizontal = self.horizontal(F.pad(h, (reach, 0, 0, 0))) + self.link(vertical)
        for_vertical, for_horizontal = _project(self.context, context)
        update = F.dropout(_gate(horizontal + for_horizontal), self.dropout, self.training)
        return _gate(vertical + for_vertical), h + self.merge(update)


def _context_projection(context_channels: int, width: int) -> nn.Conv2d | None:
    return nn.Conv2d(context_channels, 4 * width, 1, bias=False) if context_channels else None


def _project(layer: nn.Conv2d | None, context: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """The context's share in the gates of the vertical and of the horizontal stack."""
    if layer is None or context is None:
        return 0.0, 0.0
    vertical, horizontal = layer(context).chunk(2, dim=1)
    return vertical, horizontal


def _gate(x: Tensor) -> Tensor:
    content, gate = x.chunk(2, dim=1)
    return torch.tanh(content) * torch.sigmoid(gate)
