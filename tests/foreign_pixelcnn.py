"""A gated PixelCNN as many VQ-VAE projects have it, built from the description of that architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gate(x: Tensor) -> Tensor:
    content, amount = x.chunk(2, dim=1)
    return torch.tanh(content) * torch.sigmoid(amount)


class ForeignGatedLayer(nn.Module):
    """Both stacks; the first layer of a model zeroes the last row and column of its kernels in each pass."""

    def __init__(self, channels: int, kernel: int, classes: int | None, *, first: bool) -> None:
        super().__init__()
        self.first, reach = first, kernel // 2
        if classes is not None:
            self.class_cond_embedding = nn.Embedding(classes, 2 * channels)
        self.vert_stack = nn.Conv2d(channels, 2 * channels, (reach + 1, kernel), padding=reach)
        self.vert_to_horiz = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horiz_stack = nn.Conv2d(channels, 2 * channels, (1, reach + 1), padding=(0, reach))
        self.horiz_resid = nn.Conv2d(channels, channels, 1)

    def forward(self, x_v: Tensor, x_h: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.first:
            self.vert_stack.weight.data[:, :, -1].zero_()
            self.horiz_stack.weight.data[:, :, :, -1].zero_()
        added = 0.0 if label is None else self.class_cond_embedding(label)[:, :, None, None]
        vertical = self.vert_stack(x_v)[:, :, : x_v.shape[2]]
        horizontal = self.horiz_stack(x_h)[:, :, :, : x_h.shape[3]]
        inner = self.horiz_resid(gate(self.vert_to_horiz(vertical) + horizontal + added))
        return gate(vertical + added), inner if self.first else inner + x_h


class ForeignPixelCNN(nn.Module):
    def __init__(
        self,
        num_codes: int = 5,
        channels: int = 6,
        layers: int = 3,
        classes: int | None = None,
        *,
        kernels: tuple[int, int] = (7, 3),
        hidden: int = 8,
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.embedding = nn.Embedding(num_codes, channels)
        self.layers = nn.ModuleList(
            [ForeignGatedLayer(channels, kernels[index > 0], classes, first=index == 0) for index in range(layers)]
        )
        self.output_conv = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, num_codes, 1)
        )

    def forward(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        x_v = x_h = self.embedding(codes.view(-1)).view(*codes.size(), -1).permute(0, 3, 1, 2)
        for layer in self.layers:
            x_v, x_h = layer(x_v, x_h, label)
        return self.output_conv(x_h)


class ForeignMaskedConv2d(nn.Conv2d):
    """Multiplies its weights by a mask in each pass; type A leaves the current position out."""

    def __init__(self, kind: str, i: int, o: int, kernel: int, *, bias: bool) -> None:
        super().__init__(i, o, kernel, padding=kernel // 2, bias=bias)
        mask = torch.ones_like(self.weight)
        mask[:, :, kernel // 2, kernel // 2 + (kind == "B") :] = 0
        mask[:, :, kernel // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


def foreign_sequence(
    num_codes: int = 6,
    channels: int = 5,
    layers: int = 2,
    *,
    inputs: int = 1,
    norm: bool = False,
    last: int = 1,
    kernel: int = 5,
) -> nn.Sequential:
    """A plain PixelCNN as tutorials have it: masked convolutions, batch norm or none, ReLU, logits."""
    found: list[nn.Module] = []
    for index in range(layers + 1):
        kind, width = ("B", channels) if index else ("A", inputs)
        found.append(ForeignMaskedConv2d(kind, width, channels, kernel, bias=not norm))
        found += [nn.BatchNorm2d(channels)] * norm + [nn.ReLU(inplace=True)]
    if last > 1:
        found.append(ForeignMaskedConv2d("B", channels, num_codes, last, bias=True))
    else:
        found.append(nn.Conv2d(channels, num_codes, 1))
    return nn.Sequential(*found)
