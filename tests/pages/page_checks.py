"""What must hold when the blocks of a page have been run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from page_blocks import ROOT, Work, blocks
from PIL import Image, ImageSequence
from torch import nn

import fastvq
from fastvq.data import image_grid
from fastvq.errors import ArgumentError


def _pictures(path: Path) -> list[np.ndarray]:
    with Image.open(path) as found:
        return [np.asarray(frame.convert("L")).astype(int) for frame in ImageSequence.Iterator(found)]


def is_accelerated(model: nn.Module) -> bool:
    return [one.accelerated for one in fastvq.acceleration(model).quantizers] == [True]


def first_steps(work: Work) -> None:
    """Details vary under the same top codes."""
    out, varied = work.names["out"], work.names["varied"]
    assert torch.equal(out.codes[0], varied.codes[0])
    assert not torch.equal(out.codes[1], varied.codes[1])


def sampling(work: Work) -> None:
    """One level at a time gives what both levels at once do, and kept codes are kept."""
    out, keep = work.names["out"], work.names["keep"]
    assert torch.equal(work.names["top"], out.codes[0])
    assert torch.equal(work.names["bottom"], out.codes[1])
    assert torch.equal(work.names["drawn"][:, keep], out.codes[1][:, keep])
    assert not torch.equal(work.names["drawn"], out.codes[1])


def own_priors(work: Work) -> None:
    """The page says in comments what is printed."""
    said = re.findall(r"print\(\w+\)  # (.*)", "".join(block.text for block in blocks("docs/own-priors.md")))
    assert len(said) == 2
    for shown in said:
        for words in shown.split(" ..."):
            assert words.strip(" ;:,") in "".join(work.outputs)


def own_images(work: Work) -> None:
    with Image.open("samples.png") as picture:
        assert picture.width == 2 * (64 + 2) + 2
    assert Path("reconstructions.png").is_file()
    assert Path("my/curves.png").is_file()
    assert "16 x 16" in work.outputs[-1]


def own_autoencoders(work: Work) -> None:
    out, painted, images = (work.names[name] for name in ("out", "painted", "images"))
    assert out.images.shape == (12, 1, 32, 32)
    assert torch.equal(out.images[:, :, ::8, ::8][:, 0], work.names["autoencoder"].shades[out.codes[0]].detach())
    with Image.open("own.png") as picture:
        assert np.asarray(picture).shape == (3 * 34 + 2, 4 * 34 + 2)
    assert torch.equal(painted.images[:, :, :16], images[:1, :, :16].expand(4, -1, -1, -1))
    again = work.names["pipeline"].sample(12, label=out.labels, temperature=0.9, seed=0)
    assert torch.equal(again.images, out.images)
    with pytest.raises(ArgumentError, match="save_pretrained: the autoencoder is a Shades, which only its own project"):
        work.names["pipeline"].save_pretrained(work.folder / "saved")
    assert not (work.folder / "saved").exists()


def evaluation(work: Work) -> None:
    """The report is there, rejection keeps what it says, and samples drawn in parts are found."""
    assert (work.folder / "report" / "README.md").is_file()
    assert work.names["best"].labels.tolist() == [7] * 64
    assert bool((work.names["sure"].scores >= 0.99).all())
    assert work.names["config"].samples == len(work.names["samples"]) == 40
    assert work.names["statistics"] is not None


def tutorial(work: Work) -> None:
    """The pipeline draws a column of each class, and is the same when it is loaded again."""
    out = work.names["out"]
    assert out.images.shape == (20, 1, 32, 32)
    assert Path("samples.png").is_file()
    again = fastvq.Pipeline.from_pretrained("my/pipeline").sample(20, label=range(10), temperature=0.8, seed=0)
    assert torch.equal(again.images, out.images)


def using_models(work: Work) -> None:
    names = work.names
    image, mask, painted = names["image"], names["mask"], names["painted"]
    assert painted.images.shape == (10, 1, 32, 32)
    assert torch.equal(painted.images[:, :, ~mask], image[:, :, ~mask].expand(10, -1, -1))
    assert torch.equal(names["variations"].codes[0], names["top"][0].expand(10, -1, -1))
    assert names["cold"].images.shape == (20, 1, 32, 32)
    assert names["kept"].shape == image.shape
    assert names["rows"] == [4, 8, 12, 16]
    assert [bool((grid >= 0).all()) for grid in names["begun"].codes] == [True, False]
    assert [picture.size for picture in names["pictures"]] == [(32, 32)] * 4
    assert Path("sevens.png").is_file()
    assert bool((names["bits"] > 0).all())
    assert len(_pictures(Path("filling.gif"))) == 1 + 4 + 16
    # Commands and Python do the same.
    for name, samples, columns, captions in (
        ("by-class.png", "out", 3, ["7", "3", "8"]),
        ("temperature.png", "cold", 10, [*"0123456789"]),
        ("variations.png", "variations", None, None),
        ("samples.png", "ten", 10, [*"0123456789"]),
    ):
        expected = image_grid(names[samples].images, columns, captions=captions)
        assert np.array_equal(_pictures(Path(name))[0], expected), name
    _shows_what_its_commands_make("docs/using-models.md", ROOT / "docs" / "using-models")


def _shows_what_its_commands_make(page: str, folder: Path) -> None:
    """Up to what a decoder rounds, and to a code that lay next to a boundary, on another processor."""
    shown = re.findall(rf"\]\({folder.name}/(.+?)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in folder.iterdir())
    for name in shown:
        made, theirs = _pictures(Path(name)), _pictures(folder / name)
        assert len(made) == len(theirs)
        for mine, other in zip(made, theirs, strict=True):
            assert mine.shape == other.shape
            assert np.abs(mine - other).mean() < 4, name
