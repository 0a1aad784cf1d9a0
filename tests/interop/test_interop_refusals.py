"""What cannot be loaded is refused with the names, shapes or values that do not fit."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import ForeignVQVAE
from helpers import refuses
from interop_helpers import foreign_prior
from torch import nn

from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, MissingFileError
from fastvq.interop import load

pytestmark = [
    pytest.mark.usefixtures("steady"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated"),
]


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_unfit_keys() -> None:
    state = foreign_prior().state_dict()
    lost = {k: v for k, v in state.items() if k not in ("out.1.conv.bias", "blocks.0.causal_attention.key.weight_g")}
    with refuses(
        ArgumentError,
        "source: keys do not fit the layout: "
        r"2 missing \(blocks.0.causal_attention.key.weight_g, out.1.conv.bias\)$",
    ):
        load(lost, heads=2)
    with refuses(ArgumentError, r"source: keys do not fit the layout: 1 unknown \(blocks.0.extra\)$"):
        load({**state, "blocks.0.extra": torch.zeros(1)}, heads=2)
    del state["horizontal.conv.conv.weight_v"]
    with refuses(ArgumentError, "source: horizontal.conv.conv.weight_v is missing, so that the architecture"):
        load(state)
    state = ForeignVQVAE().state_dict()
    del state["quantize_b.embed"]
    with refuses(ArgumentError, r"source: keys do not fit the layout: 1 missing \(quantize_b.embed\)$"):
        load(state)
    both = foreign_prior().state_dict()
    name = "out.1.conv.parametrizations.weight.original0"
    with refuses(ArgumentError, "source: holds the same weight-normalised layer under both spellings"):
        load({**both, name: both["out.1.conv.weight_g"]})


def test_unfit_shapes() -> None:
    state = foreign_prior().state_dict()
    with refuses(
        ArgumentError,
        r"source: tensors of unexpected shape: blocks.1.query_resblock.conv1.conv.bias \[3\] \(expected \[12\]\)",
    ):
        load({**state, "blocks.1.query_resblock.conv1.conv.bias": torch.zeros(3)}, heads=2)
    with refuses(ArgumentError, "source: expected 4 dimensions of background"):
        load({**state, "background": torch.zeros(2, 4, 6)}, heads=2)
    with refuses(ArgumentError, "source: expected in background the coordinates"):
        load({**state, "background": state["background"].flip(1)}, heads=2)
    with refuses(ArgumentError, "heads: expected a divisor of the attention's 6 channels, got 8"):
        load(state)
    bottom = foreign_prior("bottom").state_dict()
    with refuses(ArgumentError, r"shape: the condition's grid is half of the prior's, which is odd: \(5, 6\)"):
        load(bottom, shape=(5, 6))
    even = {**state, "blocks.0.resblocks.0.conv1.conv.conv.weight_v": torch.zeros(10, 12, 4, 4)}
    with refuses(ArgumentError, "source: expected an odd kernel size from 3"):
        load(even, heads=2)


def test_unfit_values() -> None:
    state = foreign_prior().state_dict()
    state["out.1.conv.weight_g"] = torch.full_like(state["out.1.conv.weight_g"], math.nan)
    state["blocks.0.causal_attention.key.weight_v"] = torch.zeros(6, 26)
    with refuses(
        ArgumentError,
        "source: weights that are not finite, or whose norm is zero: "
        "blocks.0.causal_attention.key.weight_g, out.1.conv.weight_g$",
    ):
        load(state, heads=2)
    with refuses(ArgumentError, "source: expected tensors with values, got background on the meta device"):
        load({**state, "background": state["background"].to("meta")}, heads=2)
    with refuses(ArgumentError, "source: expected floating-point tensors, got torch.int64 for background"):
        load({**state, "background": state["background"].long()}, heads=2)


def test_wrong_kind_and_layout() -> None:
    with refuses(ArgumentError, "kind: expected 'vqvae', but this is the state dict of a 'pixelsnail'"):
        load(foreign_prior().state_dict(), kind="vqvae")
    with refuses(ArgumentError, "kind: expected one of 'pixelsnail', 'gated_pixelcnn', 'pixelcnn', 'vqvae', got 'gan'"):
        load(foreign_prior().state_dict(), kind="gan")
    with refuses(ArgumentError, "source: unknown layout: expected keys such as horizontal.conv.*"):
        load(nn.Linear(2, 2).state_dict())
    with refuses(ArgumentError, "shape: a VQVAE takes images of any size"):
        load(ForeignVQVAE().state_dict(), shape=(4, 4))


def test_unfit_arguments() -> None:
    state = foreign_prior().state_dict()
    with refuses(ArgumentTypeError, "source: expected the path of a checkpoint, .* got list"):
        load([1])  # type: ignore[arg-type]
    with refuses(ArgumentError, "source: expected a state dict of named tensors, got 'epoch' which are not"):
        load({"epoch": 3})
    with refuses(ArgumentError, "source: expected a state dict of named tensors, got none"):
        load({})
    with refuses(ArgumentTypeError, "legacy: expected a bool, got NoneType None"):
        load(state, legacy=None)  # type: ignore[arg-type]
    with refuses(ArgumentError, r"shape: expected \(height, width\), got 4"):
        load(state, shape=4)  # type: ignore[arg-type]
    with refuses(ArgumentError, "shape: must be at least 1, got 0"):
        load(state, shape=(0, 4))
    with refuses(ArgumentError, "heads: must be at least 1, got 0"):
        load(state, heads=0)


def test_unfit_files(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with refuses(MissingFileError, f"source: {path} does not exist"):
        load(path)
    trap = Trap(tmp_path / "trap")
    torch.save({"model": foreign_prior().state_dict(), "args": trap}, path)
    with refuses(CorruptFileError, f"source: {path} asks for .*mkdir, which loading would import and run"):
        load(path)
    torch.save({"model": {}, "args": trap}, path, _use_new_zipfile_serialization=False)
    with refuses(CorruptFileError, f"source: {path} is not a checkpoint of tensors"):
        load(path)
    assert not trap.folder.exists()
    torch.save(foreign_prior().state_dict(), path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], b"\0" * 100):
        path.write_bytes(damaged)
        with refuses(CorruptFileError, f"source: {path} is"):
            load(path)
    torch.save([1, 2], path)
    with refuses(ArgumentTypeError, "source: expected the path of a checkpoint"):
        load(path)
