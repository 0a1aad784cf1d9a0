"""Quantisers of image autoencoders: MONAI's, those of VQGAN, and of the common port of VQ-VAE-2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.interop.quantizers.kind import Accelerated, Draw
from fastvq.interop.quantizers.steps import (
    assign,
    can_run,
    compact,
    look_up,
    mean_error,
    move,
    over_processes,
    search,
    straight_through,
)
from fastvq.ops.nearest_code import CodeStatistics


class MonaiQuantizer(Accelerated):
    kind = "MONAI EMAQuantizer"
    classes = ("EMAQuantizer",)
    has = ("embedding", "ema_cluster_size", "ema_w", "commitment_cost", "epsilon", "flatten_permutation", "ddp_sync")

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        return [module.embedding.weight]

    @classmethod
    def ready(cls, copy: Any, draw: Draw) -> None:
        super().ready(copy, draw)
        copy.ema_w.copy_(copy.embedding.weight)
        copy.ema_cluster_size.fill_(1)
        copy.ddp_sync = False

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        return (draw(2, module.embedding_dim, *[2] * module.spatial_dims),)

    def forward(self, inputs: Tensor) -> Any:
        codes = self.embedding.weight
        # Of float64 the original returns a sum with the input.
        fits = can_run(inputs, codes) and inputs.ndim == self.spatial_dims + 2 and inputs.dtype is not torch.float64
        if not fits or codes.requires_grad or inputs.shape[1] != self.embedding_dim:
            return super().forward(inputs)
        vectors = compact(inputs.flatten(2).transpose(1, 2))
        found = assign(vectors.view(-1, self.embedding_dim).float(), codes)
        indices = found.indices.view(inputs.shape[0], *inputs.shape[2:])
        quantized = look_up(indices, codes, inputs)
        if self.training:
            self._move(found)
        loss = self.commitment_cost * mean_error(inputs, quantized, found.squared_error)
        return straight_through(inputs, quantized), loss, indices

    def _move(self, found: CodeStatistics) -> None:
        counts, sums = found.counts.to(found.sums.dtype), found.sums
        if self.ddp_sync:
            self.distributed_synchronization(counts, sums)
        averages = self.ema_cluster_size, self.ema_w, self.embedding.weight
        move(counts, sums, *averages, decay=self.decay, eps=self.epsilon)


class PortQuantizer(Accelerated):
    """Codes lie in columns, [D, K]."""

    kind = "VQ-VAE-2 port Quantize"
    classes = ("Quantize",)
    has = ("dim", "n_embed", "decay", "eps", "embed", "embed_avg", "cluster_size", "embed_code")
    meets = True

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        return [module.embed]

    @classmethod
    def ready(cls, copy: Any, draw: Draw) -> None:
        super().ready(copy, draw)
        copy.embed_avg.copy_(copy.embed)
        copy.cluster_size.fill_(1)

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        return (draw(2, 2, 2, module.dim),)

    def forward(self, input: Tensor) -> Any:
        if not can_run(input, self.embed):
            return super().forward(input)
        found = assign(input.reshape(-1, self.dim).float(), self.embed.t())
        indices = found.indices.view(input.shape[:-1])
        quantized = self.embed_code(indices)
        if self.training:
            counts, sums = found.counts, found.sums
            # Earlier versions of the file do not add over processes.
            if "all_reduce" in self.original.forward.__code__.co_names:
                counts, sums = over_processes(counts, sums)
            averages = self.cluster_size, self.embed_avg.t(), self.embed.t()
            move(counts, sums, *averages, decay=self.decay, eps=self.eps)
        error = mean_error(input, quantized, found.squared_error)
        return straight_through(input, quantized), error, indices


class VqganQuantizer(Accelerated):
    """Codes are learnt by gradients, and the term that moves them has a weight of its own in either order."""

    kind = "taming-transformers VectorQuantizer2"
    classes = ("VectorQuantizer2", "VectorQuantizer")
    has = ("embedding", "beta", "legacy", "remap", "sane_index_shape")

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        return [module.embedding.weight]

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        return (draw(2, module.embedding.weight.shape[1], 2, 2),)

    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        codes = self.embedding.weight
        if args or kwargs or z.ndim != 4 or z.dtype is not torch.float32 or not can_run(z, codes):
            return super().forward(z, *args, **kwargs)
        vectors = z.movedim(1, -1).contiguous()
        indices = search(vectors.view(-1, codes.shape[1]), codes)
        quantized = self.embedding(indices).view(vectors.shape)
        to_vectors = F.mse_loss(quantized.detach(), vectors)
        to_codes = F.mse_loss(quantized, vectors.detach())
        loss = to_vectors + self.beta * to_codes if self.legacy else self.beta * to_vectors + to_codes
        out = straight_through(vectors, quantized).movedim(-1, 1).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(z.shape[0], -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(out.shape[0], *out.shape[2:])
        return out, loss, (None, None, indices)


class OneHotQuantizer(Accelerated):
    """Recognised, and left as it is."""

    kind = "taming-transformers VectorQuantizer"
    classes = ("VectorQuantizer",)
    has = ("n_e", "e_dim", "beta", "embedding")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return "it returns a one-hot row for each vector; VectorQuantizer2 does not"
