"""Plain PixelCNN prior: masked convolutions, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import require_odd, require_positive_int
from fastvq.models.blocks import CausalConv2d, CodeConv2d, causal_taps
from fastvq.models.limits import LARGEST, LARGEST_KERNEL, MOST_LAYERS
from fastvq.models.prior import Prior, PriorConfig


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig(PriorConfig):
    """Masked convolutions with ReLU between them (van den Oord et al. 2016, "Pixel Recurrent Neural Networks").

    Other fields are those of :class:`PriorConfig`.

    Args:
        channels: width of the layers.
        layers: masked convolutions after the first.
        kernel_size: odd.
        output_kernel_size: of the layer that gives logits, odd; 1 reads the current position alone.
    """

    channels: int = 64
    layers: int = 7
    kernel_size: int = 7
    output_kernel_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "channels", maximum=LARGEST)
        self._require(require_positive_int, "layers", minimum=0, maximum=MOST_LAYERS)
        self._require(require_odd, "kernel_size", minimum=3, maximum=LARGEST_KERNEL)
        self._require(require_odd, "output_kernel_size", minimum=1, maximum=LARGEST_KERNEL)

    @property
    def least_tensors(self) -> int:
        return super().least_tensors + self.layers


class PixelCNN(Prior):
    """A prior of masked convolutions, one after the other.

    van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.5, without residual connections.

    The first layer leaves the current code out. With square masked kernels, some positions above right of the current
    one are never seen, however many layers there are; :class:`fastvq.GatedPixelCNN` has no such blind spot.

    Args:
        config, fields: a configuration, or its fields as keywords, alone or to replace some.
    """

    config_class: ClassVar[type[PixelCNNConfig]] = PixelCNNConfig
    config: PixelCNNConfig
    presets: ClassVar[Mapping[str, PixelCNNConfig]] = {}

    def __init__(self, config: PixelCNNConfig | None = None, **fields: Any) -> None:
        config = self.config_class.of(config, fields)
        super().__init__(config)
        width, kernel, last = config.channels, config.kernel_size, config.output_kernel_size
        self.input = CodeConv2d(config.num_codes, width, causal_taps(kernel))
        self.layers = nn.ModuleList(
            [CausalConv2d(width, width, kernel, mask="inclusive", form="symmetric") for _ in range(config.layers)]
        )
        context = self.context_channels
        self.contexts = nn.ModuleList(
            [nn.Conv2d(context, width, 1, bias=False) for _ in range(config.layers + 1 if context else 0)]
        )
        self.output = CausalConv2d(width, config.num_codes, last, mask="inclusive", form="symmetric")

    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        h = self.input(self.check_codes(codes))
        if context is not None:
            context = context[:, :, : h.shape[2]]
        for index, layer in enumerate([*self.layers, self.output]):
            if context is not None:
                h = h + self.contexts[index](context)
            h = layer(F.dropout(F.relu(h), self.config.dropout, self.training))
        return h
