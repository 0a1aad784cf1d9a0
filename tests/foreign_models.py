"""Autoencoder and prior as the widely used port lays them out, built from the description of that architecture.

Names of modules, and so keys of state dicts, follow the port; so do its two habits that matter here: activations that
may overwrite their input (``inplace``), and causal kernels that are masked by zeroing the parameter in each pass.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Spelling = Literal["old", "new"]


def normed(layer: nn.Module, spelling: Spelling) -> nn.Module:
    if spelling == "new":
        return parametrizations.weight_norm(layer)
    return nn.utils.weight_norm(layer)


class Normed2d(nn.Module):
    """A weight-normalised convolution; ``pad`` is (left, right, top, bottom)."""

    def __init__(
        self,
        i: int,
        o: int,
        kernel: tuple[int, int],
        pad: tuple[int, int, int, int],
        spelling: Spelling,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = normed(nn.Conv2d(i, o, kernel, bias=bias), spelling)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class Causal2d(nn.Module):
    """Holds a convolution named ``conv``; with ``masked`` zeroes its current row from that column on before use."""

    def __init__(
        self,
        i: int,
        o: int,
        kernel: tuple[int, int],
        pad: tuple[int, int, int, int],
        spelling: Spelling,
        masked: int | None = None,
    ) -> None:
        super().__init__()
        self.conv = Normed2d(i, o, kernel, pad, spelling)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        if self.masked is not None:
            direction(self.conv.conv).data[:, :, -1, self.masked :] = 0
        return self.conv(x)


def direction(layer: nn.Module) -> Tensor:
    """The parameter v of weight norm in either spelling."""
    return layer.weight_v if hasattr(layer, "weight_v") else layer.parametrizations.weight.original1


class Gated(nn.Module):
    def __init__(
        self,
        width: int,
        hidden: int,
        kernel: int,
        *,
        spelling: Spelling,
        inplace: bool,
        causal: bool = False,
        auxiliary: int = 0,
        condition: int = 0,
    ) -> None:
        super().__init__()
        reach = kernel // 2

        def conv(i: int, o: int) -> nn.Module:
            if causal:
                return Causal2d(i, o, (kernel, kernel), (reach, reach, kernel - 1, 0), spelling, masked=reach)
            return Normed2d(i, o, (kernel, kernel), (reach, reach, reach, reach), spelling)

        self.activation = nn.ELU(inplace=inplace)
        self.conv1 = conv(width, hidden)
        if auxiliary:
            self.aux_conv = pointwise(auxiliary, hidden, spelling)
        self.dropout = nn.Dropout(0.25)
        self.conv2 = conv(hidden, 2 * width)
        if condition:
            self.condition = pointwise(condition, 2 * width, spelling, bias=False)

    def forward(self, x: Tensor, auxiliary: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(self.activation(x))
        if auxiliary is not None:
            h = h + self.aux_conv(self.activation(auxiliary))
        h = self.conv2(self.dropout(self.activation(h)))
        if condition is not None:
            h = h + self.condition(condition)
        content, gate = h.chunk(2, dim=1)
        return x + content * torch.sigmoid(gate)


def pointwise(i: int, o: int, spelling: Spelling, bias: bool = True) -> Normed2d:
    return Normed2d(i, o, (1, 1), (0, 0, 0, 0), spelling, bias)


class Attention(nn.Module):
    def __init__(self, query: int, key: int, width: int, heads: int, spelling: Spelling) -> None:
        super().__init__()
        self.query = normed(nn.Linear(query, width), spelling)
        self.key = normed(nn.Linear(key, width), spelling)
        self.value = normed(nn.Linear(key, width), spelling)
        self.n_head = heads

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        grid = key.shape[2:]

        def heads(layer: nn.Module, x: Tensor) -> Tensor:
            flat = layer(x.flatten(2).transpose(1, 2))
            return flat.unflatten(2, (self.n_head, -1)).transpose(1, 2)

        q, k, v = heads(self.query, query), heads(self.key, key), heads(self.value, key)
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        earlier = torch.ones(logits.shape[-2:], device=logits.device).tril(-1)
        weights = logits.masked_fill(earlier == 0, -1e4).softmax(-1)
        first = torch.ones_like(weights[..., :1])
        first[:, :, 0] = 0
        found = (weights * first) @ v
        return found.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, grid)


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        hidden: int,
        kernel: int,
        layers: int,
        attention: bool,
        condition: int,
        heads: int,
        spelling: Spelling,
        inplace: bool,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"spelling": spelling, "inplace": inplace}
        self.resblocks = nn.ModuleList(
            [Gated(width, hidden, kernel, causal=True, condition=condition, **kind) for _ in range(layers)]
        )
        self.attention = attention
        if attention:
            self.key_resblock = Gated(2 * width + 2, width, 1, **kind)
            self.query_resblock = Gated(width + 2, width, 1, **kind)
            self.causal_attention = Attention(width + 2, 2 * width + 2, width // 2, heads, spelling)
            self.out_resblock = Gated(width, width, 1, auxiliary=width // 2, **kind)
        else:
            self.out = pointwise(width + 2, width, spelling)

    def forward(self, x: Tensor, background: Tensor, condition: Tensor | None) -> Tensor:
        features = x
        for block in self.resblocks:
            features = block(features, condition=condition)
        if not self.attention:
            return self.out(torch.cat([features, background], 1))
        key = self.key_resblock(torch.cat([x, features, background], 1))
        query = self.query_resblock(torch.cat([features, background], 1))
        return self.out_resblock(features, self.causal_attention(query, key))


class ConditionNet(nn.Module):
    def __init__(self, codes: int, width: int, kernel: int, layers: int, spelling: Spelling, inplace: bool) -> None:
        super().__init__()
        reach = kernel // 2
        first = Normed2d(codes, width, (kernel, kernel), (reach, reach, reach, reach), spelling)
        blocks = [Gated(width, width, kernel, spelling=spelling, inplace=inplace) for _ in range(layers)]
        self.blocks = nn.Sequential(first, *blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ForeignSnail(nn.Module):
    """Random weights; the masked entries of causal kernels are not zero, as after a step of an optimiser."""

    def __init__(
        self,
        shape: tuple[int, int] = (4, 6),
        n_class: int = 5,
        channel: int = 12,
        kernel_size: int = 3,
        n_block: int = 2,
        n_res_block: int = 2,
        res_channel: int = 10,
        attention: bool = True,
        n_cond_res_block: int = 0,
        cond_res_channel: int = 0,
        cond_res_kernel: int = 3,
        n_out_res_block: int = 0,
        heads: int = 2,
        spelling: Spelling = "old",
        inplace: bool = False,
    ) -> None:
        super().__init__()
        height, width = shape
        reach = kernel_size // 2
        self.n_class = n_class
        self.horizontal = Causal2d(n_class, channel, (reach, kernel_size), (reach, reach, reach - 1, 0), spelling)
        self.vertical = Causal2d(n_class, channel, (reach + 1, reach), (reach - 1, 0, reach, 0), spelling)
        rows = (torch.arange(height) - height / 2) / height
        columns = (torch.arange(width) - width / 2) / width
        grid = torch.stack([rows[:, None].expand(shape), columns[None].expand(shape)])
        self.register_buffer("background", grid[None].clone())
        self.blocks = nn.ModuleList(
            [
                Block(
                    channel,
                    res_channel,
                    kernel_size,
                    n_res_block,
                    attention,
                    cond_res_channel,
                    heads,
                    spelling,
                    inplace,
                )
                for _ in range(n_block)
            ]
        )
        if n_cond_res_block:
            self.cond_resnet = ConditionNet(
                n_class, cond_res_channel, cond_res_kernel, n_cond_res_block, spelling, inplace
            )
        ends = [Gated(channel, res_channel, 1, spelling=spelling, inplace=inplace) for _ in range(n_out_res_block)]
        # The last activation worked in place in both generations.
        self.out = nn.Sequential(*ends, nn.ELU(inplace=True), pointwise(channel, n_class, spelling))

    def one_hot(self, codes: Tensor) -> Tensor:
        return F.one_hot(codes, self.n_class).movedim(-1, 1).to(self.background.dtype)

    def forward(
        self, input: Tensor, condition: Tensor | None = None, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        cache = {} if cache is None else cache
        height, width = input.shape[1:]
        x = self.one_hot(input)
        down = F.pad(self.horizontal(x), (0, 0, 1, 0))[:, :, :height]
        right = F.pad(self.vertical(x), (1, 0))[..., :width]
        background = self.background[:, :, :height].expand(input.shape[0], -1, -1, -1)
        features = None
        if condition is not None:
            if "condition" not in cache:
                encoded = self.cond_resnet(self.one_hot(condition))
                cache["condition"] = encoded.repeat_interleave(2, 2).repeat_interleave(2, 3)
            features = cache["condition"][:, :, :height]
        x = down + right
        for block in self.blocks:
            x = block(x, background, features)
        return self.out(x), cache


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(inplace=inplace),
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return x + h


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Codebook(nn.Module):
    def __init__(self, dim: int, count: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("embed", torch.randn(dim, count))
        self.register_buffer("cluster_size", torch.rand(count))
        self.register_buffer("embed_avg", torch.randn(dim, count))

    def nearest(self, x: Tensor) -> Tensor:
        vectors = x.movedim(1, -1)[..., None]
        return (vectors - self.embed).square().sum(-2).argmin(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.embed.T[codes].movedim(-1, 1)


class ForeignVQVAE(nn.Module):
    def __init__(
        self,
        in_channel: int = 3,
        channel: int = 12,
        n_res_block: int = 2,
        n_res_channel: int = 5,
        embed_dim: int = 6,
        n_embed: int = 9,
        decay: float = 0.9,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        half = channel // 2

        def halve(i: int, o: int) -> nn.Module:
            return nn.Conv2d(i, o, 4, stride=2, padding=1)

        def double(i: int, o: int) -> nn.Module:
            return nn.ConvTranspose2d(i, o, 4, stride=2, padding=1)

        def residuals() -> list[nn.Module]:
            return [*(Residual(channel, n_res_channel, inplace) for _ in range(n_res_block)), relu()]

        def relu() -> nn.Module:
            return nn.ReLU(inplace=True)

        def near(i: int, o: int) -> nn.Module:
            return nn.Conv2d(i, o, 3, padding=1)

        self.enc_b = Stack(
            halve(in_channel, half), relu(), halve(half, channel), relu(), near(channel, channel), *residuals()
        )
        self.enc_t = Stack(halve(channel, half), relu(), near(half, channel), *residuals())
        self.quantize_conv_t = nn.Conv2d(channel, embed_dim, 1)
        self.quantize_t = Codebook(embed_dim, n_embed, decay)
        self.dec_t = Stack(near(embed_dim, channel), *residuals(), double(channel, embed_dim))
        self.quantize_conv_b = nn.Conv2d(embed_dim + channel, embed_dim, 1)
        self.quantize_b = Codebook(embed_dim, n_embed, decay)
        self.upsample_t = double(embed_dim, embed_dim)
        self.dec = Stack(
            near(2 * embed_dim, channel), *residuals(), double(channel, half), relu(), double(half, in_channel)
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        bottom = self.enc_b(images)
        top = self.enc_t(bottom)
        top_codes = self.quantize_t.nearest(self.quantize_conv_t(top))
        told = self.dec_t(self.quantize_t.lookup(top_codes))
        return top_codes, self.quantize_b.nearest(self.quantize_conv_b(torch.cat([told, bottom], 1)))

    def decode_code(self, top: Tensor, bottom: Tensor) -> Tensor:
        upsampled = self.upsample_t(self.quantize_t.lookup(top))
        return self.dec(torch.cat([upsampled, self.quantize_b.lookup(bottom)], 1))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a size at which every layer matters; the masked entries of causal kernels are large."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("weight_g", "original0")):
            values = 0.5 + values.abs()
        elif name.endswith("bias"):
            values = 0.5 * values
        elif parameter.ndim == 4 and not name.endswith(("weight_v", "original1")):
            values = 1.5 * values / math.sqrt(parameter[0].numel())
        parameter.copy_(values)
    return model.eval()
