"""Foreign priors of several architectures, and checks that ours compute the same."""

from __future__ import annotations

from typing import Any

import torch
from foreign_models import ForeignSnail, ForeignVQVAE, randomise
from helpers import random_codes
from torch import Tensor

from fastvq.models import VQVAE2, PixelSNAIL

EPS = torch.finfo(torch.float32).eps
TOP: dict[str, Any] = {}
BOTTOM: dict[str, Any] = {"attention": False, "n_cond_res_block": 2, "cond_res_channel": 7}
PRIORS: dict[str, dict[str, Any]] = {
    "top": TOP,
    "bottom": BOTTOM,
    "top-5x5-kernel": {"shape": (5, 3), "kernel_size": 5, "n_block": 1, "n_out_res_block": 2},
    "bottom-5x5-kernel": {**BOTTOM, "shape": (6, 2), "kernel_size": 5, "cond_res_kernel": 5, "n_out_res_block": 1},
    "conditioned-attention": {**BOTTOM, "attention": True, "heads": 3, "channel": 18, "n_block": 1},
    "no-gated-layers": {"n_res_block": 0},
    "one-row": {"shape": (1, 7)},
    "one-column": {"shape": (6, 1), "n_block": 1},
    "odd-channels": {"channel": 13, "attention": False, "res_channel": 3},
}


def foreign_prior(name: str = "top", *, seed: int = 0, **changes: Any) -> ForeignSnail:
    return randomise(ForeignSnail(**{**PRIORS[name], **changes}), seed)


def foreign_codes(model: ForeignSnail, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    height, width = model.background.shape[2:]
    codes = random_codes(batch, height, width, num_codes=model.n_class)
    conditioned = hasattr(model, "cond_resnet")
    return codes, random_codes(batch, height // 2, width // 2, num_codes=model.n_class, seed=1) if conditioned else None


def require_equal(ours: Tensor, theirs: Tensor, ulps: float = 16) -> None:
    """Equal up to some units in the last place of the largest value, for sums in another order."""
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= ulps * EPS, f"{error / EPS:.1f} units in the last place"


@torch.no_grad()
def require_same_prior(ours: PixelSNAIL, theirs: ForeignSnail) -> None:
    codes, condition = foreign_codes(theirs)
    for rows in {codes.shape[1], 1}:
        part = codes[:, :rows]
        require_equal(ours(part, condition), theirs(part.clone(), condition)[0])


@torch.no_grad()
def require_same_vqvae(ours: VQVAE2, theirs: ForeignVQVAE, *, size: tuple[int, int] = (24, 40)) -> None:
    images = torch.rand(2, theirs.enc_b.blocks[0].in_channels, *size) * 2 - 1
    found, wanted = ours.encode(images), theirs.encode(images)
    for mine, yours in zip(found, wanted, strict=True):
        assert torch.equal(mine, yours)
        assert mine.unique().numel() > 2
    require_equal(ours.decode(found), theirs.decode_code(*wanted))
