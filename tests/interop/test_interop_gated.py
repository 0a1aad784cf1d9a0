"""A gated PixelCNN of other projects computes the same after conversion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import randomise
from foreign_pixelcnn import ForeignPixelCNN
from helpers import random_codes, refuses
from interop_helpers import require_equal

import fastvq
from fastvq.errors import ArgumentError
from fastvq.interop import convert, load, recognise
from fastvq.models import GatedPixelCNN

pytestmark = pytest.mark.usefixtures("steady")
SHAPE = (6, 5)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "classes": {"classes": 4},
    "first-5x5-then-5x5": {"kernels": (5, 5), "layers": 2},
    "first-3x3-then-5x5": {"kernels": (3, 5), "layers": 2, "hidden": 3},
    "first-layer-alone": {"layers": 1},
}


def foreign(name: str = "plain") -> ForeignPixelCNN:
    return randomise(ForeignPixelCNN(**MODELS[name]))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_gives_the_same_logits(name: str) -> None:
    theirs = foreign(name)
    ours = load(theirs.state_dict(), shape=SHAPE)  # with masked entries that no pass has zeroed yet
    assert isinstance(ours, GatedPixelCNN)
    assert ours.config.shape == SHAPE
    codes = random_codes(4, *SHAPE, num_codes=theirs.num_codes)
    label = torch.arange(4) if "classes" in MODELS[name] else None
    require_equal(ours(codes, label=label), theirs(codes, label), ulps=32)
    live = convert(theirs, shape=SHAPE)
    assert isinstance(live, GatedPixelCNN)
    torch.testing.assert_close(live(codes, label=label), ours(codes, label=label), rtol=0, atol=0)


def test_it_is_sampled_by_every_engine(tmp_path: Path) -> None:
    theirs = foreign("classes")
    torch.save({"model": theirs.state_dict()}, tmp_path / "prior.pt")
    ours = load(tmp_path / "prior.pt", kind="gated_pixelcnn", shape=SHAPE)
    assert isinstance(ours, GatedPixelCNN)
    noise = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 3, 1])
    wanted = torch.zeros(3, *SHAPE, dtype=torch.int64)
    with torch.no_grad():
        for row in range(SHAPE[0]):
            for column in range(SHAPE[1]):
                odds = theirs(wanted, label)[:, :, row, column].softmax(1).cumsum(1)
                wanted[:, row, column] = (odds <= noise[:, row, column, None]).sum(1).clamp(max=4)
    for engine in ("naive", "torch", "cpu"):
        assert torch.equal(fastvq.sample(ours, 3, label=label, noise=noise, engine=engine), wanted)


def test_a_converted_prior_is_saved_and_loaded(tmp_path: Path) -> None:
    ours = convert(foreign("classes"), shape=SHAPE)
    ours.save_pretrained(tmp_path / "prior")
    again = GatedPixelCNN.from_pretrained(tmp_path / "prior")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_a_live_module_is_converted_once_for_each_grid_and_after_changes() -> None:
    theirs = foreign()
    first = convert(theirs, shape=SHAPE)
    assert convert(theirs, shape=list(SHAPE)) is first
    other = convert(theirs, shape=(3, 3))
    assert isinstance(other, GatedPixelCNN)
    assert other.config.shape == (3, 3)
    with torch.no_grad():
        theirs.output_conv[2].bias[0] += 1
    changed = convert(theirs, shape=(3, 3))
    assert isinstance(changed, GatedPixelCNN)
    assert (changed.output.bias[0] - other.output.bias[0]).item() == pytest.approx(1)


def test_layouts_are_told_apart() -> None:
    assert recognise(foreign()) == "gated_pixelcnn"
    with refuses(ArgumentError, re.escape("kind: expected 'vqvae', but this is the state dict of a 'gated_pixelcnn'")):
        load(foreign().state_dict(), kind="vqvae", shape=SHAPE)


def test_what_does_not_fit_is_named() -> None:
    state = foreign("classes").state_dict()
    narrow = {**state, "layers.0.horiz_stack.weight": torch.zeros(12, 6, 1, 3)}
    without = {name: value for name, value in state.items() if name != "layers.1.class_cond_embedding.weight"}
    shallow = {name: value for name, value in state.items() if not name.startswith("layers.1.")}
    for source, shape, message in (
        (state, None, "shape: expected the grid (H, W) of this prior, which its state dict does not hold, got None"),
        (state, 6, "shape: expected (height, width), got 6"),
        (without, SHAPE, "source: keys do not fit the layout: 1 missing (layers.1.class_cond_embedding.weight)"),
        ({**state, "norm": torch.ones(3)}, SHAPE, "source: keys do not fit the layout: 1 unknown (norm)"),
        (shallow, SHAPE, "source: layers.1.vert_stack.weight is missing"),
        (narrow, SHAPE, "source: tensors of unexpected shape: layers.0.horiz_stack.weight [12, 6, 1, 3] (expected [12"),
    ):
        with refuses(ArgumentError, re.escape(message)):
            load(source, shape=shape)  # type: ignore[arg-type]
