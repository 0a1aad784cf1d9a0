"""Who quantises residuals in the benchmark: fastvq in one pass and level by level, and vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.nearest_code import COMMITMENT, DECAY, EPS, Averages
from bench.registry import peer
from bench.residual import Contender, Residual
from fastvq.models import ResidualVQ
from fastvq.models.quantizer.gradient import pass_gradient


@peer("residual quantiser", name="fastvq")
class Fastvq(Contender):
    """`fastvq.models.ResidualVQ`."""

    def __init__(self, problem: Residual) -> None:
        super().__init__(problem)
        case = self.case
        self.module = ResidualVQ(
            case.levels,
            case.num_codes,
            case.code_dim,
            decay=DECAY,
            eps=EPS,
            commitment=COMMITMENT,
            channels_last=True,
        )
        self.module.to(case.device).train(case.what == "training")

    def buffers(self) -> Sequence[Averages]:
        levels = [self.module.quantizer(level) for level in range(self.case.levels)]
        found = []
        for level in levels:
            assert level.embedding_sum is not None
            found.append(Averages(level.cluster_size, level.embedding_sum, level.embedding))
        return found

    def run(self) -> Tensor:
        return self.module(self.x).codes if self.case.what == "training" else self.module.encode(self.x)


@peer("residual quantiser", name="levels in turn")
class InTurn(Fastvq):
    """The quantisers of the same module, one after the other, by plain subtraction."""

    def run(self) -> Tensor:
        levels = [self.module.quantizer(level) for level in range(self.case.levels)]
        if self.case.what == "encode":
            return self._encode()
        residual, total, codes, losses = self.x, torch.zeros_like(self.x), [], []
        for level in levels:
            out = level(residual)
            code = out.quantized.detach()
            residual, total = residual - code, total + code
            codes.append(out.codes)
            losses.append(out.commitment_loss)
        # What a training step goes on with.
        pass_gradient(self.x, total, "straight_through"), torch.stack(losses).sum()
        return torch.stack(codes, -1)

    @torch.no_grad()
    def _encode(self) -> Tensor:
        residual, codes = self.x, []
        for level in range(self.case.levels):
            quantizer = self.module.quantizer(level)
            codes.append(quantizer.encode(residual))
            residual = residual - quantizer.lookup(codes[-1])
        return torch.stack(codes, -1)


@peer(
    "residual quantiser",
    name="vector-quantize-pytorch",
    requires=("vector_quantize_pytorch", "vector-quantize-pytorch"),
)
class VectorQuantizePytorch(Contender):
    """The residual quantiser of vector-quantize-pytorch, with the same settings and everything optional off."""

    def __init__(self, problem: Residual) -> None:
        super().__init__(problem)
        from vector_quantize_pytorch import ResidualVQ as TheirResidualVQ

        case = self.case
        self.module = TheirResidualVQ(
            dim=case.code_dim,
            num_quantizers=case.levels,
            codebook_size=case.num_codes,
            decay=DECAY,
            eps=EPS,
            commitment_weight=COMMITMENT,
            kmeans_init=False,
            threshold_ema_dead_code=0,
            rotation_trick=False,
        ).to(case.device)
        self.module.train(case.what == "training")

    def buffers(self) -> Sequence[Averages]:
        books = [layer._codebook for layer in self.module.layers]
        return [Averages(book.cluster_size[0], book.embed_avg[0], book.embed[0]) for book in books]

    def run(self) -> Tensor:
        with torch.set_grad_enabled(self.case.what == "training"):
            return self.module(self.x[None])[1][0]
