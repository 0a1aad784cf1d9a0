"""The plain PixelCNN of many tutorials: a sequence of masked convolutions and ReLU, with or without batch norm.

Its input is one channel of k / (K - 1) for code k, as ``ToTensor`` makes of pixels, or one channel for each code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.interop.links import Link, Shape, fill, require_depth, required_grid, shape_of
from fastvq.models.blocks import causal_taps
from fastvq.models.plain_pixelcnn import PixelCNN, PixelCNNConfig
from fastvq.models.stored import outline

# PyTorch's default, which a state dict does not hold.
_EPS = 1e-5
_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Layer:
    """A convolution of the sequence and what follows it, by their names; None for what is not there."""

    name: str
    bias: bool
    mask: bool
    norm: str | None

    def sources(self) -> list[str]:
        found = [f"{self.name}.weight"] + [f"{self.name}.bias"] * self.bias
        return found + ([] if self.norm is None else [f"{self.norm}.{part}" for part in _NORM])

    def shapes(self, weight: Shape) -> list[Shape]:
        """Of the sources."""
        channels = (weight[0],)
        return [weight] + [channels] * self.bias + ([] if self.norm is None else [channels] * len(_NORM))

    def folded(self, weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias with the normalisation of evaluation mode."""
        bias = rest[0] if self.bias else weight.new_zeros(weight.shape[0])
        if self.norm is None:
            return weight, bias
        scale, shift, mean, variance = rest[-4:]
        scale = scale / (variance + _EPS).sqrt()
        return weight * scale[:, None, None, None], (bias - mean) * scale + shift


def build(tensors: Mapping[str, Tensor], *, shape: tuple[int, int] | None) -> PixelCNN:
    """Our prior with these weights, on a grid of ``shape``, which is not stored in this layout."""
    layers = layers_of(tensors)
    config, inputs = infer(tensors, layers, shape=shape)
    require_depth(config, tensors)
    model = outline(lambda: PixelCNN(config))
    beside: dict[str, Shape] = {f"{one.name}.mask": tensors[f"{one.name}.weight"].shape for one in layers if one.mask}
    fill(model, links(config, layers, inputs), tensors, beside)
    return model


def layers_of(tensors: Mapping[str, Tensor]) -> list[Layer]:
    """The convolutions of the sequence, in order."""
    numbers = sorted({int(match[1]) for name in tensors if (match := re.match(r"(\d{1,9})\.", name))})
    convolutions = [n for n in numbers if f"{n}.weight" in tensors and tensors[f"{n}.weight"].ndim == 4]
    found = []
    for index, number in enumerate(convolutions):
        after = convolutions[index + 1] if index + 1 < len(convolutions) else number + 2
        norm = next((str(n) for n in numbers if number < n < after and f"{n}.running_mean" in tensors), None)
        found.append(Layer(str(number), f"{number}.bias" in tensors, f"{number}.mask" in tensors, norm))
    return found


def infer(
    tensors: Mapping[str, Tensor], layers: list[Layer], *, shape: tuple[int, int] | None
) -> tuple[PixelCNNConfig, int]:
    """The architecture, from names and shapes alone, and how many channels the input has."""
    if len(layers) < 2:
        raise ArgumentError(f"source: expected two convolutions or more in the sequence, got {len(layers)}")
    first, *inner, last = layers
    channels, inputs, _, kernel = shape_of(tensors, f"{first.name}.weight", 4)
    num_codes, _, _, output_kernel = shape_of(tensors, f"{last.name}.weight", 4)
    if inputs not in (1, num_codes):
        raise ArgumentError(
            f"source: expected an input of 1 channel or of {num_codes}, one for each code, got {inputs} of "
            f"{first.name}.weight"
        )
    if last.norm is not None:
        raise ArgumentError(f"source: expected no normalisation after the last convolution, got {last.norm}")
    config = PixelCNNConfig(
        shape=required_grid(shape),
        num_codes=num_codes,
        channels=channels,
        layers=len(inner),
        kernel_size=kernel,
        output_kernel_size=output_kernel,
        dropout=0.0,
    )
    return config, inputs


def links(config: PixelCNNConfig, layers: list[Layer], inputs: int) -> list[Link]:
    """Where every tensor of our prior comes from."""
    first, *inner, last = layers
    kernel, width = (config.kernel_size, config.kernel_size), config.channels

    def table(weight: Tensor, *rest: Tensor) -> Tensor:
        """What each code adds at each tap that comes before the current position: [T, K, C]."""
        folded, reach = first.folded(weight, *rest)[0], config.kernel_size // 2
        taps = [folded[:, :, row + reach, column + reach].T for row, column in causal_taps(config.kernel_size)]
        if inputs == 1:
            values = torch.arange(config.num_codes, dtype=weight.dtype, device=weight.device) / (config.num_codes - 1)
            taps = [values[:, None] * tap for tap in taps]
        return torch.stack(taps)

    found = _linked("input", first, (width, inputs, *kernel), table)
    for index, layer in enumerate(inner):
        found += _linked(f"layers.{index}", layer, (width, width, *kernel))
    return found + _linked("output", last, (config.num_codes, width, *[config.output_kernel_size] * 2))


def _linked(target: str, layer: Layer, weight: Shape, make: Callable[..., Tensor] | None = None) -> list[Link]:
    sources, shapes = tuple(layer.sources()), layer.shapes(weight)
    made = make or (lambda *given: layer.folded(*given)[0])
    return [
        Link(f"{target}.weight", sources, lambda _: shapes, made),
        Link(f"{target}.bias", sources, lambda _: shapes, lambda *given: layer.folded(*given)[1]),
    ]
