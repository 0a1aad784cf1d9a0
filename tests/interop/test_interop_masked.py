"""A plain PixelCNN of other projects computes the same after conversion."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_models import randomise
from foreign_pixelcnn import foreign_sequence
from helpers import random_codes, refuses
from interop_helpers import require_equal
from torch import Tensor, nn

import fastvq
from fastvq.errors import ArgumentError
from fastvq.interop import convert, load, recognise
from fastvq.models import PixelCNN

pytestmark = pytest.mark.usefixtures("steady")
SHAPE, NUM_CODES = (6, 5), 6
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-norm": {"norm": True},
    "one-hot": {"inputs": NUM_CODES, "kernel": 3},
    "masked-logits": {"last": 5, "layers": 1},
    "first-and-last-alone": {"layers": 0},
}


def foreign(name: str = "plain") -> nn.Sequential:
    net = randomise(foreign_sequence(NUM_CODES, **MODELS[name]))
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    return net.eval()


def logits(net: nn.Sequential, codes: Tensor) -> Tensor:
    if net[0].in_channels == 1:
        return net(codes[:, None] / (NUM_CODES - 1))
    return net(F.one_hot(codes, NUM_CODES).permute(0, 3, 1, 2).float())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_gives_the_same_logits(name: str) -> None:
    theirs = foreign(name)
    state = {f"net.{key}": value for key, value in theirs.state_dict().items()}
    ours = load(state, shape=SHAPE)
    assert isinstance(ours, PixelCNN)
    codes = random_codes(3, *SHAPE, num_codes=NUM_CODES)
    require_equal(ours(codes), logits(theirs, codes), ulps=64)
    live = convert(theirs, shape=SHAPE)
    assert isinstance(live, PixelCNN)
    assert torch.equal(live(codes), ours(codes))


def test_it_is_sampled_by_every_engine() -> None:
    ours = load(foreign("batch-norm").state_dict(), kind="pixelcnn", shape=SHAPE)
    assert isinstance(ours, PixelCNN)
    wanted = fastvq.sample(ours, 4, seed=0, engine="naive")
    for engine in ("torch", "cpu"):
        assert torch.equal(fastvq.sample(ours, 4, seed=0, engine=engine), wanted)


def test_layouts_are_told_apart() -> None:
    assert recognise(foreign()) == "pixelcnn"
    assert recognise(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1))) is None


def test_what_does_not_fit_is_named() -> None:
    state = foreign("batch-norm").state_dict()
    fit = "source: keys do not fit the layout: "
    odd = "source: expected an input of 1 channel or of 6, one for each code, got 3 of 0.weight"
    alone = {name: value for name, value in state.items() if name[0] in "01"} | {"2.weight": torch.ones(3)}
    for source, shape, message in (
        (state, None, "shape: expected the grid (H, W) of this prior, which its state dict does not hold, got None"),
        ({name: value for name, value in state.items() if name != "4.bias"}, SHAPE, f"{fit}1 missing (4.bias)"),
        ({**state, "2.extra": torch.ones(3)}, SHAPE, f"{fit}1 unknown (2.extra)"),
        (foreign_sequence(6, inputs=3).state_dict(), SHAPE, odd),
        (alone, SHAPE, "source: expected two convolutions or more in the sequence, got 1"),
    ):
        with refuses(ArgumentError, re.escape(message)):
            load(source, shape=shape)
