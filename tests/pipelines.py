"""Pipelines of one to three levels of random weights."""

from __future__ import annotations

from typing import Any

import torch
from helpers import snail

from fastvq.models import VQVAEConfig, build
from fastvq.sampling import Pipeline

GRIDS = [(2, 3), (4, 6), (8, 12)]


def vqvae_of(levels: int, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "channels": 8,
        "residual_channels": 4,
        "residual_layers": 1,
        "num_codes": 5,
        "code_dim": 3,
    }
    return build(VQVAEConfig(in_channels=1, strides=(2,) * levels, **{**fields, **changes})).eval()


def prior_of(place: int, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "shape": GRIDS[place],
        "level": place,
        "condition_shapes": tuple(GRIDS[:place]),
        "condition_num_codes": (5,) * place,
        "num_classes": 3,
        "attention": place == 0,
    }
    prior = snail(**{**fields, **changes})
    with torch.no_grad():
        prior.output.weight.mul_(8)
    return prior


def pipeline_of(levels: int, **changes: Any) -> Pipeline:
    torch.manual_seed(0)
    return Pipeline(vqvae_of(levels), [prior_of(level, **changes) for level in range(levels)])
