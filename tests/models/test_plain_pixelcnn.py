"""The plain PixelCNN prior."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_codes
from torch import Tensor

import fastvq
from fastvq.errors import ArgumentError
from fastvq.models import PixelCNN, PixelCNNConfig

FIELDS: dict[str, Any] = {"shape": (4, 5), "num_codes": 6, "channels": 8, "layers": 2, "kernel_size": 3, "dropout": 0.0}
CONDITIONED: dict[str, Any] = {
    **FIELDS,
    "shape": (4, 6),
    "level": 1,
    "num_classes": 3,
    "condition_shapes": ((2, 3),),
    "condition_num_codes": (4,),
    "condition_channels": 5,
    "condition_blocks": 1,
}


def prior(**fields: Any) -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(PixelCNNConfig(**fields)).eval()


def conditions(n: int) -> dict[str, Tensor]:
    return {"condition": random_codes(n, 2, 3, num_codes=4), "label": torch.arange(n) % 3}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"output_kernel_size": 3}], ids=["1x1", "3x3"])
def test_logits_depend_on_earlier_codes_alone(changes: dict[str, Any]) -> None:
    model, codes = prior(**FIELDS, **changes), random_codes(1, 4, 5, num_codes=6)
    before = model(codes).flatten(2)
    for position in range(20):
        changed = codes.clone()
        changed.view(-1)[position] = (changed.view(-1)[position] + 1) % 6
        moved = (model(changed).flatten(2) != before).any(1)[0]
        assert not moved[: position + 1].any()
        assert position == 19 or moved[position + 1 :].any()


@pytest.mark.parametrize("fields", [FIELDS, CONDITIONED], ids=["plain", "conditioned"])
def test_engines_agree(fields: dict[str, Any]) -> None:
    model = prior(**fields)
    given = conditions(3) if fields is CONDITIONED else {}
    wanted = fastvq.sample(model, 3, seed=1, engine="naive", **given)
    assert wanted.unique().numel() > 3
    for engine in ("torch", "cpu"):
        assert torch.equal(fastvq.sample(model, 3, seed=1, engine=engine, **given), wanted)


def test_every_parameter_learns() -> None:
    model = prior(**CONDITIONED).train()
    logits = model(random_codes(2, 4, 6, num_codes=6), **conditions(2))
    torch.nn.functional.cross_entropy(logits, random_codes(2, 4, 6, num_codes=6, seed=2)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_fields_come_as_keywords_as_of_other_models() -> None:
    assert PixelCNN(**FIELDS).config == PixelCNNConfig(**FIELDS)
    changed = PixelCNN(PixelCNNConfig(**FIELDS), layers=1)
    assert (changed.config.layers, len(changed.layers)) == (1, 1)
    with pytest.raises(ArgumentError, match="PixelCNNConfig: no field 'widths'"):
        PixelCNN(**FIELDS, widths=3)
