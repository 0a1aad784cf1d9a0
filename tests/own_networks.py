"""Causal networks as people write them, none of which knows anything of fastvq."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.models import PriorConfig


class MaskedConv2d(nn.Conv2d):
    """The mask is a buffer, multiplied into the weights in every pass."""

    mask: Tensor

    def __init__(self, kind: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))
        rows, columns = self.kernel_size
        self.mask[:, :, rows // 2, columns // 2 + (kind == "B") :] = 0
        self.mask[:, :, rows // 2 + 1 :] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class Masked(nn.Module):
    """A PixelCNN of masked convolutions with batch norms, on one-hot codes."""

    def __init__(self, num_codes: int, width: int = 8, kernel: int = 5) -> None:
        super().__init__()
        self.num_codes = num_codes
        pad = kernel // 2
        self.net = nn.Sequential(
            MaskedConv2d("A", num_codes, width, kernel, padding=pad, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            MaskedConv2d("B", width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Conv2d(width, num_codes, 1),
        )

    def forward(self, codes: Tensor) -> Tensor:
        return self.net(F.one_hot(codes, self.num_codes).permute(0, 3, 1, 2).float())


class Residual(nn.Module):
    """Residual masked convolutions with ReLU and 1 x 1, on an embedding."""

    def __init__(self, num_codes: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, width)
        self.first = MaskedConv2d("A", width, 2 * width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(2 * width, width, 1),
                nn.ReLU(),
                MaskedConv2d("B", width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 1),
            )
            for _ in range(2)
        )
        self.last = nn.Conv2d(2 * width, num_codes, 1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.first(self.embedding(codes).permute(0, 3, 1, 2).contiguous())
        for block in self.blocks:
            x = x + block(x)
        return self.last(F.leaky_relu(x, 0.1))


FORMS = ("sdpa", "start", "scaled", "first", "own-codes")


def config(shape: tuple[int, int], num_codes: int) -> PriorConfig:
    return PriorConfig(shape=shape, num_codes=num_codes)


def concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], dim=1))


class Shifted(nn.Module):
    """Convolutions shifted down and right by padding, weight norm, concat ELU, GLU, features of a level above."""

    def __init__(self, num_codes: int, width: int = 6, above: int = 4, scale: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.num_codes = num_codes
        self.start_down = norm(nn.Conv2d(num_codes, width, (2, 3)))
        self.start_right = norm(nn.Conv2d(num_codes, width, (2, 1)))
        self.above = nn.Sequential(nn.Conv2d(above, width, 3, padding=1), nn.ELU(), nn.Upsample(scale_factor=scale))
        self.told = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for _ in range(2))
        self.one = nn.ModuleList(norm(nn.Conv2d(2 * width, width, (2, 2))) for _ in range(2))
        self.two = nn.ModuleList(norm(nn.Conv2d(2 * width, 2 * width, (2, 2))) for _ in range(2))
        self.output = nn.Linear(width, num_codes)
        self.num_above = above

    @staticmethod
    def down(x: Tensor) -> Tensor:
        return F.pad(x[:, :, :-1], (0, 0, 1, 0))

    @staticmethod
    def right(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :, :, :1]), x[:, :, :, :-1]], dim=3)

    @staticmethod
    def corner(conv: nn.Module, x: Tensor) -> Tensor:
        return conv(F.pad(x, (1, 0, 1, 0)))

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        x = F.one_hot(codes, self.num_codes).permute(0, 3, 1, 2).float()
        told = self.above(F.one_hot(condition, self.num_above).permute(0, 3, 1, 2).float())
        u = self.down(self.start_down(F.pad(x, (1, 1, 1, 0))))
        h = u + self.right(self.start_right(F.pad(x, (0, 0, 1, 0))))
        for one, two, layer in zip(self.one, self.two, self.told, strict=True):
            inner = self.corner(one, concat_elu(h))
            h = h + F.glu(self.corner(two, concat_elu(inner)) + layer(told), dim=1)
        return self.output(F.elu(h).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attending(nn.Module):
    """PixelSNAIL in small: shifted convolutions, then attention by matrix products or by PyTorch's function.

    Args:
        form: how the attention is written.
    """

    background: Tensor
    mask: Tensor

    def __init__(self, num_codes: int, form: str, shape: tuple[int, int] = (4, 3), width: int = 8) -> None:
        super().__init__()
        height, columns = shape
        self.num_codes, self.form, self.heads = num_codes, form, 2
        rows = (torch.arange(height) / height - 0.5)[None, None, :, None].expand(1, 1, height, columns)
        across = (torch.arange(columns) / columns - 0.5)[None, None, None, :].expand(1, 1, height, columns)
        self.register_buffer("background", torch.cat([rows, across], dim=1))
        self.register_buffer("mask", torch.ones(height * columns, height * columns).tril(-1))
        self.embedding = nn.Embedding(num_codes, width)
        self.down = nn.Conv2d(width, width, (2, 3))
        self.right = nn.Conv2d(width, width, (1, 2))
        self.inner = nn.Conv2d(width, 2 * width, (2, 2))
        self.pairs = nn.Conv2d(2 * width + 2, 2 * width, 1)
        self.query = nn.Conv2d(width + 2, width, 1)
        self.mix = nn.Conv2d(2 * width, 2 * width, 1)
        self.output = nn.Conv2d(width, num_codes, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, heads, N, d] each."""
        seen = self.mask.bool()
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(2, 3)
        if self.form == "start":  # the first position is set to zero afterwards
            scores = scores / q.shape[3] ** 0.5
            start = torch.ones(len(seen), 1)
            start[0] = 0
            return (torch.softmax(scores.masked_fill(~seen, -1e4), dim=3) * start) @ v
        if self.form in ("scaled", "own-codes"):  # no root, and numbers that are added
            return torch.softmax(scores + (1 - self.mask) * -1e9, dim=-1).masked_fill(~seen, 0.0) @ v
        first = seen.clone()  # the first position sees itself
        first[0, 0] = True
        return torch.softmax(torch.where(first, scores, -torch.inf), dim=-1) @ v

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes).permute(0, 3, 1, 2)
        background = self.background.expand(len(codes), -1, -1, -1)
        own = x
        above = F.elu(self.down(F.pad(x, (1, 1, 2, 0))))[:, :, :-1]
        x = above + self.right(F.pad(x, (2, 0, 0, 0)))[:, :, :, :-1]
        a, b = self.inner(F.pad(F.elu(x), (1, 0, 1, 0))).chunk(2, dim=1)
        features = x + a * torch.sigmoid(b)
        batch, width, height, columns = features.shape
        own = own if self.form == "own-codes" else x  # keys and values may see the code of their own position
        k, v = self.pairs(torch.cat([own, features, background], dim=1)).split(width, dim=1)
        q = self.query(torch.cat([features, background], dim=1))
        q, k, v = (y.reshape(batch, self.heads, -1, height * columns).transpose(2, 3) for y in (q, k, v))
        found = self.attend(q, k, v).transpose(2, 3).reshape(batch, width, height, columns)
        return self.output(F.elu(features + F.glu(self.mix(F.elu(torch.cat([features, found], dim=1))), dim=1)))
