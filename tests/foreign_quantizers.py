"""Quantisers of other projects, written from their descriptions, as people have them in files of their own."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def distances(x: Tensor, codes: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.t()


class Quantize(nn.Module):
    """Of the VQ-VAE-2 port: codes in columns, moving averages, channels last."""

    def __init__(self, dim: int, n_embed: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = input.reshape(-1, self.dim)
        index = distances(flat, self.embed.t()).min(1)[1]
        onehot = F.one_hot(index, self.n_embed).type(flat.dtype)
        index = index.view(input.shape[:-1])
        quantize = self.embed_code(index)
        if self.training:
            count, total = onehot.sum(0), flat.transpose(0, 1) @ onehot
            if dist.is_initialized():
                dist.all_reduce(count)
                dist.all_reduce(total)
            self.cluster_size.data.mul_(self.decay).add_(count, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(total, alpha=1 - self.decay)
            n = self.cluster_size.sum()
            size = (self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n
            self.embed.data.copy_(self.embed_avg / size.unsqueeze(0))
        diff = (quantize.detach() - input).pow(2).mean()
        return input + (quantize - input).detach(), diff, index

    def embed_code(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.embed.transpose(0, 1))


class VectorQuantizer2(nn.Module):
    """Of taming-transformers: codes learnt by gradients, a choice of used codes, channels first."""

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: list[int] | None = None,
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self.remap = remap
        if remap is not None:
            self.register_buffer("used", torch.tensor(remap))
        self.sane_index_shape = sane_index_shape

    def remap_to_used(self, index: Tensor) -> Tensor:
        match = index[..., None] == self.used
        return torch.where(match.any(-1), match.long().argmax(-1), 0)

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> tuple:
        z = z.movedim(1, -1).contiguous()
        index = distances(z.view(-1, self.e_dim), self.embedding.weight).argmin(1)
        z_q = self.embedding(index).view(z.shape)
        to_z, to_codes = (z_q.detach() - z).square().mean(), (z_q - z.detach()).square().mean()
        loss = to_z + self.beta * to_codes if self.legacy else self.beta * to_z + to_codes
        z_q = (z + (z_q - z).detach()).movedim(-1, 1).contiguous()
        if self.remap is not None:
            index = self.remap_to_used(index.view(z.shape[0], -1)).view(-1, 1)
        if self.sane_index_shape:
            index = index.view(z_q.shape[0], *z_q.shape[2:])
        return z_q, loss, (None, None, index)


class VectorQuantizer(nn.Module):
    """Of taming-transformers, the older one, which returns one-hot rows."""

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z: Tensor) -> tuple:
        z = z.movedim(1, -1).contiguous()
        index = distances(z.view(-1, self.e_dim), self.embedding.weight).argmin(1)
        rows = F.one_hot(index, self.n_e).type(z.dtype)
        z_q = (rows @ self.embedding.weight).view(z.shape)
        loss = (z_q.detach() - z).square().mean() + self.beta * (z_q - z.detach()).square().mean()
        z_q = (z + (z_q - z).detach()).movedim(-1, 1).contiguous()
        return z_q, loss, (torch.exp(-torch.xlogy(rows.mean(0), rows.mean(0)).sum()), rows, index[:, None])


class VectorQuantize(nn.Module):
    """Of descript-audio-codec: a search between projected vectors and codes of unit length."""

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = nn.utils.parametrizations.weight_norm(nn.Conv1d(input_dim, codebook_dim, 1))
        self.out_proj = nn.utils.parametrizations.weight_norm(nn.Conv1d(codebook_dim, input_dim, 1))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        z_e = self.in_proj(z)
        z_q, index = self.decode_latents(z_e)
        commitment = F.mse_loss(z_e, z_q.detach(), reduction="none").mean([1, 2])
        codebook = F.mse_loss(z_q, z_e.detach(), reduction="none").mean([1, 2])
        return self.out_proj(z_e + (z_q - z_e).detach()), commitment, codebook, index, z_e

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        rows = F.normalize(latents.transpose(1, 2).reshape(-1, latents.shape[1]))
        index = distances(rows, F.normalize(self.codebook.weight)).argmin(1).view(latents.shape[0], -1)
        return F.embedding(index, self.codebook.weight).transpose(1, 2), index


class EuclideanCodebook(nn.Module):
    """Of encodec: moving averages of its own process, dead codes replaced by vectors of the batch."""

    def __init__(self, dim: int, codebook_size: int, decay: float = 0.99, threshold_ema_dead_code: int = 2) -> None:
        super().__init__()
        self.codebook_size, self.decay, self.epsilon = codebook_size, decay, 1e-5
        self.threshold_ema_dead_code = threshold_ema_dead_code
        embed = torch.randn(codebook_size, dim)
        self.register_buffer("inited", torch.Tensor([True]))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def init_embed_(self, data: Tensor) -> None:
        pass

    def expire_codes_(self, vectors: Tensor) -> None:
        expired = self.cluster_size < self.threshold_ema_dead_code
        if self.threshold_ema_dead_code and expired.any():
            chosen = vectors[torch.randint(0, len(vectors), (self.codebook_size,))]
            self.embed.data.copy_(torch.where(expired[:, None], chosen, self.embed))

    def preprocess(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2)

    def quantize(self, x: Tensor) -> Tensor:
        return (-distances(x, self.embed)).max(-1).indices

    def postprocess_emb(self, index: Tensor, shape: torch.Size) -> Tensor:
        return index.view(*shape[:-1])

    def dequantize(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.embed)

    def encode(self, x: Tensor) -> Tensor:
        return self.postprocess_emb(self.quantize(self.preprocess(x)), x.shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, x = x.shape, self.preprocess(x)
        self.init_embed_(x)
        index = self.quantize(x)
        onehot = F.one_hot(index, self.codebook_size).type(x.dtype)
        index = self.postprocess_emb(index, shape)
        quantize = self.dequantize(index)
        if self.training:
            self.expire_codes_(x)
            self.cluster_size.data.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_((x.t() @ onehot).t(), alpha=1 - self.decay)
            n = self.cluster_size.sum()
            size = (self.cluster_size + self.epsilon) / (n + self.codebook_size * self.epsilon) * n
            self.embed.data.copy_(self.embed_avg / size.unsqueeze(1))
        return quantize, index
