"""Priors of other projects, written from the descriptions of their architectures, and how they are sampled there."""

from __future__ import annotations

import functools
import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import registry
from bench.cases import OwnPriorCase
from bench.harness import Check, timed
from bench.sampler import MARGIN
from fastvq.ops.draw import draw_margin
from fastvq.sampling.noise import uniforms

# Of the naive sampler, whose positions all cost the same.
_TIMED_POSITIONS = 3


def gate(x: Tensor) -> Tensor:
    content, amount = x.chunk(2, dim=1)
    return torch.tanh(content) * torch.sigmoid(amount)


class GatedLayer(nn.Module):
    """Vertical and horizontal stack of a gated PixelCNN; the first layer masks its kernels in each pass."""

    def __init__(self, channels: int, kernel: int, *, first: bool) -> None:
        super().__init__()
        self.first, reach = first, kernel // 2
        self.vertical = nn.Conv2d(channels, 2 * channels, (reach + 1, kernel), padding=(reach, reach))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, reach + 1), padding=(0, reach))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.merge = nn.Conv2d(channels, channels, 1)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            self.vertical.weight.data[:, :, -1] = 0
            self.horizontal.weight.data[:, :, :, -1] = 0
        vertical = self.vertical(v)[:, :, : v.shape[2]]
        horizontal = self.horizontal(h)[:, :, :, : h.shape[3]]
        inner = self.merge(gate(horizontal + self.link(vertical)))
        return gate(vertical), inner if self.first else inner + h


class GatedPixelCNN(nn.Module):
    """The gated PixelCNN of the VQ-VAE projects that embed their codes."""

    def __init__(self, num_codes: int, channels: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        self.layers = nn.ModuleList(
            [GatedLayer(channels, 3 if index else 7, first=index == 0) for index in range(layers)]
        )
        self.output = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, num_codes, 1))

    def forward(self, codes: Tensor) -> Tensor:
        v = h = self.embedding(codes).permute(0, 3, 1, 2)
        for layer in self.layers:
            v, h = layer(v, h)
        return self.output(h)


class MaskedConv2d(nn.Conv2d):
    """A convolution whose kernel is multiplied by a mask; without its centre for the first layer."""

    def __init__(self, i: int, o: int, kernel: int, *, centre: bool) -> None:
        super().__init__(i, o, kernel, padding=kernel // 2)
        mask = torch.zeros(kernel, kernel)
        mask[: kernel // 2] = 1
        mask[kernel // 2, : kernel // 2 + int(centre)] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class SnailResidual(nn.Module):
    """Two 2 x 2 convolutions that read up and left, and a gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 2, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        inner = F.elu(self.first(F.elu(x)))[:, :, :height, :width]
        content, amount = self.second(inner)[:, :, :height, :width].chunk(2, dim=1)
        return x + content * torch.sigmoid(amount)


class SnailAttention(nn.Module):
    """Attention to the positions before; keys and values see the codes as well."""

    def __init__(self, channels: int, codes: int, key: int, value: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.key_width = key
        self.query = nn.Conv2d(channels, key, 1)
        self.key_value = nn.Conv2d(channels + codes, key + value, 1)
        self.merge = nn.Conv2d(value, value, 1)
        positions = shape[0] * shape[1]
        self.register_buffer("mask", torch.ones(positions, positions).tril(-1))

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        query = self.query(x).flatten(2).transpose(1, 2)
        key, value = (
            self.key_value(torch.cat([x, codes], 1))
            .flatten(2)
            .split_with_sizes([self.key_width, self.merge.in_channels], dim=1)
        )
        scores = query @ key / math.sqrt(self.key_width)
        weights = scores.masked_fill(self.mask == 0, -math.inf).softmax(-1).masked_fill(self.mask == 0, 0)
        found = (weights @ value.transpose(1, 2)).transpose(1, 2)
        return self.merge(found.reshape(batch, -1, height, width))


class SnailBlock(nn.Module):
    def __init__(self, channels: int, codes: int, key: int, value: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.residual = nn.Sequential(SnailResidual(channels), SnailResidual(channels))
        self.attention = SnailAttention(channels + 2, codes, key, value, shape)
        self.residual_out = nn.Conv2d(channels, channels, 1)
        self.attention_out = nn.Conv2d(value, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, codes: Tensor, places: Tensor) -> Tensor:
        inner = self.residual(x)
        found = self.attention(torch.cat([places.expand(x.shape[0], -1, -1, -1), inner], 1), codes)
        joined = F.elu(self.residual_out(F.elu(inner))) + F.elu(self.attention_out(F.elu(found)))
        return F.elu(self.out(F.elu(joined)))


class Snail(nn.Module):
    """The PixelSNAIL of a collection of generative models, with skips around its blocks, over one-hot codes."""

    def __init__(
        self, num_codes: int, channels: int, blocks: int, shape: tuple[int, int], *, key: int = 4, value: int = 32
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.input = MaskedConv2d(num_codes, channels, 3, centre=False)
        self.blocks = nn.ModuleList([SnailBlock(channels, num_codes, key, value, shape) for _ in range(blocks)])
        self.output = nn.Sequential(nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, num_codes, 1))
        rows, columns = torch.meshgrid(*(torch.arange(side) / side - 0.5 for side in shape), indexing="ij")
        self.register_buffer("places", torch.stack([rows, columns])[None])

    def forward(self, codes: Tensor) -> Tensor:
        one_hot = F.one_hot(codes, self.num_codes).permute(0, 3, 1, 2).float()
        x = self.input(one_hot)
        for block in self.blocks:
            x = x + block(x, one_hot, self.places)
        return self.output(x)


@functools.lru_cache(maxsize=1)
def module_of(case: OwnPriorCase) -> nn.Module:
    """The case's module with random weights; the same object until another case asks for its own."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if case.module == "gated PixelCNN":
            return GatedPixelCNN(case.num_codes, case.channels, case.layers, case.hidden).eval()
        return Snail(case.num_codes, case.channels, case.layers, case.shape).eval()


@registry.problem("own prior")
class OwnPrior(registry.Problem):
    """A module of another project that gives logits, and the uniform numbers that its codes are drawn with."""

    legend = (
        "own prior: a module of another project, as its own sampler samples it (a forward pass over the whole grid for",
        "each position; extrapolated from some) and by fastvq.sample(module, ...), traced in the first call. Check:",
        "the module's own logits for the drawn codes must give these codes, up to a margin of rounding.",
    )
    case: OwnPriorCase

    def __init__(self, case: OwnPriorCase, **rest: object) -> None:
        super().__init__(case, **rest)
        self.module = module_of(case)
        self.noise = uniforms(0, 0, case.batch, case.shape, level=0)

    @torch.inference_mode()
    def check(self, contender: registry.Contender, output: Tensor) -> Check:
        worst = math.inf
        for codes, noise in zip(output.split(1), self.noise.split(1), strict=True):
            # Margins are worked out in float64 over all codes.
            worst = min(worst, float(draw_margin(self.module(codes).movedim(1, -1), noise, codes).min()))
        return Check(worst >= -MARGIN, f"worst margin {worst:.1e}", {"worst_margin": worst})

    @torch.inference_mode()
    def naive_seconds(self) -> float:
        """Of the sampler that the project has: logits of the whole grid for every position."""
        codes = torch.randint(self.case.num_codes, (self.case.batch, *self.case.shape))

        def position() -> None:
            odds = self.module(codes)[:, :, 0, 0].softmax(1)
            codes[:, 0, 0] = odds.multinomial(1)[:, 0]

        position()
        pace = statistics.median(timed(position) for _ in range(_TIMED_POSITIONS))
        return pace * math.prod(self.case.shape)
