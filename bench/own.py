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


class CausalConv2d(nn.Conv2d):
    """Reads rows above, and its own row left of the current position; the kernel is masked in each pass."""

    def __init__(self, i: int, o: int, kernel: int) -> None:
        super().__init__(i, o, kernel)
        self.reach = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data[:, :, -1, self.reach :] = 0
        return super().forward(F.pad(x, (self.reach, self.reach, self.kernel_size[0] - 1, 0)))


class SnailGated(nn.Module):
    """x + a * sigmoid(b) of two convolutions with ELU before each."""

    def __init__(self, channels: int, hidden: int, kernel: int = 1, *, causal: bool = False, beside: int = 0) -> None:
        super().__init__()
        layer = CausalConv2d if causal else nn.Conv2d
        self.first = layer(channels, hidden, kernel)
        self.second = layer(hidden, 2 * channels, kernel)
        self.beside = nn.Conv2d(beside, hidden, 1) if beside else None

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        inner = self.first(F.elu(x))
        if self.beside is not None and beside is not None:
            inner = inner + self.beside(F.elu(beside))
        return x + F.glu(self.second(F.elu(inner)), dim=1)


class SnailAttention(nn.Module):
    """Heads of attention to the positions before; nothing for the first."""

    def __init__(self, query: int, key: int, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(query, width), nn.Linear(key, width), nn.Linear(key, width)
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        batch, _, height, width = query.shape

        def heads(layer: nn.Module, x: Tensor) -> Tensor:
            found = layer(x.flatten(2).transpose(1, 2))
            return found.view(batch, height * width, self.heads, -1).transpose(1, 2)

        q, k, v = heads(self.query, query), heads(self.key, key), heads(self.value, key)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        earlier = torch.ones(height * width, height * width, device=query.device).tril(-1)
        weights = scores.masked_fill(earlier == 0, -1e4).softmax(-1)
        start = torch.ones(height * width, 1, device=query.device)
        start[0] = 0
        found = (weights * start) @ v
        return found.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class SnailBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SnailGated(channels, channels, kernel, causal=True) for _ in range(layers)])
        self.key = SnailGated(2 * channels + 2, channels)
        self.query = SnailGated(channels + 2, channels)
        self.attention = SnailAttention(channels + 2, 2 * channels + 2, channels // 2, heads)
        self.out = SnailGated(channels, channels, beside=channels // 2)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = layer(h)
        key, query = self.key(torch.cat([x, h, places], 1)), self.query(torch.cat([h, places], 1))
        return self.out(h, self.attention(query, key))


class Snail(nn.Module):
    """PixelSNAIL as ports of it are written: one-hot codes, two shifted convolutions, gated blocks and attention."""

    def __init__(
        self, num_codes: int, channels: int, blocks: int, shape: tuple[int, int], *, kernel: int = 5, layers: int = 4
    ) -> None:
        super().__init__()
        self.num_codes, reach = num_codes, kernel // 2
        self.above = nn.Conv2d(num_codes, channels, (reach, kernel))
        self.left = nn.Conv2d(num_codes, channels, (reach + 1, reach))
        self.blocks = nn.ModuleList([SnailBlock(channels, kernel, layers, heads=4) for _ in range(blocks)])
        self.output = nn.Conv2d(channels, num_codes, 1)
        rows, columns = torch.meshgrid(*(torch.arange(side) / side - 0.5 for side in shape), indexing="ij")
        self.register_buffer("places", torch.stack([rows, columns])[None])

    def forward(self, codes: Tensor) -> Tensor:
        x = F.one_hot(codes, self.num_codes).permute(0, 3, 1, 2).float()
        height, width = self.above.kernel_size[0], self.left.kernel_size[1]
        above = self.above(F.pad(x, (width, width, height - 1, 0)))
        left = self.left(F.pad(x, (width - 1, 0, height, 0)))
        x = F.pad(above, (0, 0, 1, 0))[:, :, :-1] + F.pad(left, (1, 0, 0, 0))[:, :, :, :-1]
        places = self.places.expand(codes.shape[0], -1, -1, -1)
        for block in self.blocks:
            x = block(x, places)
        return self.output(F.elu(x))


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
