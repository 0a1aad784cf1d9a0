"""Who quantises residuals in the benchmark."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.nearest_code import COMMITMENT, DECAY, EPS
from bench.registry import peer
from bench.residual import Quantiser, Residuals
from fastvq.models import ResidualVQ, VectorQuantizer


def _buffers(level: VectorQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    assert level.embedding_sum is not None
    return level.cluster_size, level.embedding_sum, level.embedding


@peer("residual quantiser", name="fastvq")
class Module(Quantiser):
    """`fastvq.models.ResidualVQ` in training."""

    def __init__(self, problem: Residuals) -> None:
        super().__init__(problem)
        options = {"decay": DECAY, "eps": EPS, "commitment": COMMITMENT, "channels_last": True}
        sizes = self.case.levels, self.case.num_codes, self.case.code_dim
        self.module = ResidualVQ(*sizes, **options).to(self.case.device).train()

    def run(self) -> Tensor:
        return self.module(self.x).codes

    def buffers(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        return _buffers(self.module.quantizer(level))


@peer("residual quantiser", name="levels in turn")
class InTurn(Quantiser):
    """A `fastvq.models.VectorQuantizer` per level, each called on what the one before left."""

    def __init__(self, problem: Residuals) -> None:
        super().__init__(problem)
        sizes, options = (self.case.num_codes, self.case.code_dim), {"decay": DECAY, "eps": EPS}
        levels = [
            VectorQuantizer(*sizes, **options, commitment=COMMITMENT, channels_last=True)
            for _ in range(self.case.levels)
        ]
        self.module = nn.ModuleList(levels).to(self.case.device).train()

    def run(self) -> Tensor:
        residual, codes = self.x, []
        for level in self.module:
            out = level(residual)
            codes.append(out.codes)
            residual = residual - out.quantized.detach()
        return torch.stack(codes, -1)

    def buffers(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        found = self.module[level]
        assert isinstance(found, VectorQuantizer)
        return _buffers(found)


@peer(
    "residual quantiser",
    name="vector-quantize-pytorch",
    requires=("vector_quantize_pytorch", "vector-quantize-pytorch"),
)
class VectorQuantizePytorch(Quantiser):
    """The residual quantiser of vector-quantize-pytorch, with the same settings and everything optional off."""

    def __init__(self, problem: Residuals) -> None:
        super().__init__(problem)
        from vector_quantize_pytorch import ResidualVQ as Theirs

        self.module = Theirs(
            dim=self.case.code_dim,
            num_quantizers=self.case.levels,
            codebook_size=self.case.num_codes,
            decay=DECAY,
            eps=EPS,
            commitment_weight=COMMITMENT,
            kmeans_init=False,
            threshold_ema_dead_code=0,
            rotation_trick=False,
        ).to(self.case.device)
        self.module.train()

    def run(self) -> Tensor:
        return self.module(self.x[None])[1][0]

    def buffers(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        book = self.module.layers[level]._codebook
        return book.cluster_size[0], book.embed_avg[0], book.embed[0]
