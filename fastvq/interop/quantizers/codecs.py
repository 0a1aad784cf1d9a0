"""Codebooks of audio codecs: encodec and descript-audio-codec, and those of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastvq.interop.quantizers.kind import Accelerated, Draw, processes_meet
from fastvq.interop.quantizers.steps import assign, can_run, move, search


class SearchedCodebook(Accelerated):
    """The search alone: ``quantize`` of vectors [N, D]."""

    replaced: ClassVar[tuple[str, ...]] = ("quantize",)

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        return [module.embed]

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        return (draw(6, module.embed.shape[1]),)

    def quantize(self, x: Tensor) -> Any:
        codes = self.embed
        return search(x, codes) if can_run(x, codes) else super().quantize(x)  # type: ignore[misc]


class TransformersEncodec(SearchedCodebook):
    kind = "transformers Encodec codebook"
    classes = ("EncodecEuclideanCodebook",)
    has = ("embed", "embed_avg", "cluster_size", "codebook_size")


class TransformersMimi(SearchedCodebook):
    kind = "transformers Mimi codebook"
    classes = ("MimiEuclideanCodebook",)
    has = ("embed", "embed_sum", "cluster_usage", "epsilon")

    @classmethod
    def ready(cls, copy: Any, draw: Draw) -> None:
        copy.embed_sum.copy_(draw(*copy.embed_sum.shape))
        copy.cluster_usage.fill_(1)
        copy._embed = None


class EncodecCodebook(SearchedCodebook):
    """The search and, in training, the moving averages, which processes do not share."""

    kind = "encodec EuclideanCodebook"
    classes = ("EuclideanCodebook",)
    has = ("embed", "embed_avg", "cluster_size", "inited", "decay", "epsilon", "threshold_ema_dead_code", "preprocess")
    replaced = ("forward", "quantize")

    @classmethod
    def ready(cls, copy: Any, draw: Draw) -> None:
        super().ready(copy, draw)
        copy.embed_avg.copy_(copy.embed)
        copy.cluster_size.fill_(1)
        copy.inited.fill_(1)
        if processes_meet():
            copy.threshold_ema_dead_code = 0

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        shape = (2, 3) if method == "forward" else (6,)
        return (draw(*shape, module.embed.shape[1]),)

    def forward(self, x: Tensor) -> Any:
        if not can_run(x, self.embed):
            return super().forward(x)
        vectors = self.preprocess(x)
        self.init_embed_(vectors)
        if not self.training:
            indices = self.postprocess_emb(self.quantize(vectors), x.shape)
            return self.dequantize(indices), indices
        found = assign(vectors, self.embed)
        indices = self.postprocess_emb(found.indices, x.shape)
        quantized = self.dequantize(indices)
        self.expire_codes_(vectors)
        averages = self.cluster_size, self.embed_avg, self.embed
        move(found.counts, found.sums, *averages, decay=self.decay, eps=self.epsilon)
        return quantized, indices


class DacQuantizer(Accelerated):
    """The search between vectors and codes of unit length: ``decode_latents`` of [B, D, T]."""

    kind = "descript-audio-codec VectorQuantize"
    classes = ("VectorQuantize", "DacVectorQuantize")
    has = ("in_proj", "out_proj", "codebook", "codebook_dim", "decode_latents")
    replaced = ("forward", "decode_latents")

    @classmethod
    def codebooks_of(cls, module: Any) -> list[Tensor]:
        return [module.codebook.weight]

    @classmethod
    def example(cls, module: Any, method: str, draw: Draw) -> tuple[Any, ...]:
        width = module.codebook.weight.shape[1] if method == "decode_latents" else module.in_proj.in_channels
        return (draw(2, width, 3),)

    def decode_latents(self, latents: Tensor) -> Any:
        codes = self.codebook.weight
        if latents.ndim != 3 or not can_run(latents, codes):
            return super().decode_latents(latents)  # type: ignore[misc]
        vectors = latents.detach().transpose(1, 2).reshape(-1, latents.shape[1])
        found = search(F.normalize(vectors), F.normalize(codes.detach()))
        indices = found.view(latents.shape[0], -1)
        return self.codebook(indices).transpose(1, 2), indices
