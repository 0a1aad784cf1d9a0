"""Quantisers of other libraries as they are and after :func:`fastvq.accelerate`: modules, and where buffers lie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bench import registry
from bench.cases import AcceleratedCase
from bench.nearest_code import COMMITMENT, DECAY, EPS, Averages
from bench.residual import Contender, Residual

NEEDS = {
    "VectorQuantize": ("vector_quantize_pytorch", "vector-quantize-pytorch"),
    "ResidualVQ": ("vector_quantize_pytorch", "vector-quantize-pytorch"),
    "EMAQuantizer": ("monai", "monai"),
}


@registry.problem("accelerated quantiser")
class Accelerated(Residual):
    """A case's data; see :class:`bench.residual.Residual`."""

    legend = (
        "accelerated quantiser: another library's module in training, forward alone, before and after",
        "fastvq.accelerate; batch is the number N of vectors. The floor is 2 N K D operations per level. Check: codes",
        "and averages against float64, as for residual quantisers, in the module's own buffers. All threads.",
    )
    case: AcceleratedCase


def module_of(case: AcceleratedCase) -> nn.Module:
    """The library's module in training mode, with everything optional off."""
    if case.module == "EMAQuantizer":
        from monai.networks.layers.vector_quantizer import EMAQuantizer

        made = EMAQuantizer(
            2, case.num_codes, case.code_dim, commitment_cost=COMMITMENT, decay=DECAY, epsilon=EPS, ddp_sync=False
        )
        return made.to(case.device).train()
    import vector_quantize_pytorch as library

    settings = {
        "dim": case.code_dim,
        "codebook_size": case.num_codes,
        "decay": DECAY,
        "eps": EPS,
        "commitment_weight": COMMITMENT,
        "rotation_trick": False,
    }
    if case.module == "ResidualVQ":
        return library.ResidualVQ(num_quantizers=case.levels, **settings).to(case.device).train()
    return library.VectorQuantize(**settings).to(case.device).train()


class Quantising(Contender):
    """A module of another library at work; its buffers are read where that library keeps them."""

    def __init__(self, problem: Accelerated, module: nn.Module) -> None:
        super().__init__(problem)
        self.module = module

    def buffers(self) -> Sequence[Averages]:
        kind, module = self.case.module, self.module
        if kind == "EMAQuantizer":
            return [Averages(module.ema_cluster_size, module.ema_w, module.embedding.weight.detach())]
        books = [module._codebook] if kind == "VectorQuantize" else [layer._codebook for layer in module.layers]
        return [Averages(book.cluster_size[0], book.embed_avg[0], book.embed[0]) for book in books]

    def run(self) -> Tensor:
        case = self.case
        if case.module == "EMAQuantizer":
            side = round(case.batch**0.5)
            image = self.x.view(1, side, side, case.code_dim).permute(0, 3, 1, 2)
            return self.module(image)[2].reshape(-1, 1)
        return self.module(self.x[None])[1].reshape(case.batch, case.levels)
