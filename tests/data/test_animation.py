"""Animated pictures: frames, times, and files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refuses
from PIL import Image
from torch import Tensor

from fastvq.data import image_grid, save_animation
from fastvq.errors import ArgumentError, FileConflictError


def moving(count: int, channels: int = 1) -> list[Tensor]:
    """Frames of three images of 4 x 6."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, channels, 4, 6, generator=generator) * 2 - 1 for _ in range(count)]


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
@pytest.mark.parametrize(("name", "kind"), [("a.gif", "GIF"), ("a.png", "PNG"), ("a.PNG", "PNG"), ("a.webp", "WEBP")])
def test_frames_are_the_grids(name: str, kind: str, channels: int, tmp_path: Path) -> None:
    frames = moving(5, channels)
    assert save_animation(tmp_path / name, iter(frames), 2, padding=1, seconds=1.0) == tmp_path / name
    with Image.open(tmp_path / name) as found:
        assert (found.format, found.n_frames, found.size) == (kind, 5, (2 * 7 + 1, 2 * 5 + 1))
        durations = []
        for index, frame in enumerate(frames):
            found.seek(index)
            found.load()
            durations.append(round(found.info["duration"]))
            pixels = np.asarray(found.convert("L" if channels == 1 else "RGB"))
            assert np.array_equal(pixels, image_grid(frame, 2, 1)), index
        assert found.info["loop"] == 0
    assert durations == [200, 200, 200, 200, 2200]


def test_many_frames_take_no_longer(tmp_path: Path) -> None:
    save_animation(tmp_path / "a.gif", moving(60), seconds=0.1)
    with Image.open(tmp_path / "a.gif") as found:
        found.seek(3)
        assert (found.n_frames, found.info["duration"]) == (60, 20)  # which is as fast as programs go


def test_what_is_there_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("words")
    with refuses(FileConflictError, r"path: .*a.png exists already; nothing was written"):
        save_animation(path, moving(2))
    assert path.read_text() == "words"
    save_animation(path, moving(2), overwrite=True)
    assert Image.open(path).format == "PNG"


def test_animations_that_are_not_written(tmp_path: Path) -> None:
    with refuses(ArgumentError, r"path: expected a name that ends in .gif, .png, .webp, got .*a.jpg"):
        save_animation(tmp_path / "a.jpg", moving(2))
    with refuses(ArgumentError, "frames: expected at least one frame, got none"):
        save_animation(tmp_path / "a.gif", [])
    large = torch.zeros(1, 1, 2100, 2100)
    with refuses(
        ArgumentError, "path: an animated picture may have 4194304 pixels, this one has 2104 x 2104; show fewer"
    ):
        save_animation(tmp_path / "a.gif", [large])
    assert [*tmp_path.iterdir()] == []
