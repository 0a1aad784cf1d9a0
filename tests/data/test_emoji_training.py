"""The script that trains priors for few pictures: its copies, and all of its steps on a tiny project."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import script_at
from PIL import Image
from torch import Tensor

import fastvq
from fastvq.cli import main

pytestmark = pytest.mark.usefixtures("steady")

SCRIPT = Path(__file__).parents[2] / "docs" / "emoji" / "train_priors.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_at(SCRIPT)


def corners() -> Tensor:
    """Six images of a constant of its own in each channel, but for one corner."""
    images = torch.zeros(6, 3, 8, 8) + torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    images[:, :, 0, 0] = 0.5
    return images


def test_copies(script: ModuleType) -> None:
    images, generator = corners(), torch.Generator().manual_seed(0)
    assert torch.equal(script.changed("as it is", images, generator), images)
    assert torch.equal(script.changed("mirrored", images, generator)[:, :, 0, 7], images[:, :, 0, 0])
    for kind, orders in (("moved", {(0, 1, 2)}), ("recoloured", set(script._CHANNELS)), ("turned", {(0, 1, 2)})):
        copies = script.changed(kind, images, generator)
        assert copies.shape == images.shape
        centre = copies[:, :, 4, 4]
        assert {tuple((image.round().int() + 1).tolist()) for image in centre} <= orders
        assert not torch.equal(copies, images)


def test_moved_by_nothing_is_the_image_or_its_mirror_image(script: ModuleType) -> None:
    images = torch.randn(8, 3, 6, 6)
    found = script.moved(images, 0, 0, 0, torch.Generator().manual_seed(0))
    same = [bool((found[i] - images[i]).abs().max() < 1e-5) for i in range(8)]
    mirrored = [bool((found[i] - images[i].flip(2)).abs().max() < 1e-5) for i in range(8)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 0 < sum(same) < 8


def test_likelier_the_nearer(script: ModuleType) -> None:
    near = script.Neighbours(torch.tensor([[0.0], [1.0], [2.0], [9.0]]))
    e = np.exp(-np.array([0.0, 1.0, 4.0, 81.0]))
    np.testing.assert_allclose(near.chances[0], e / e.sum(), rtol=1e-6)
    assert set(near(torch.zeros(50, 2, dtype=torch.int64)).unique().tolist()) <= {0, 1, 2}


def test_all_steps(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(12):
        path = Path("pictures") / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    quiet = ["--quiet", "--device", "cpu"]
    model = ["--size", "16", "--preset", "tiny", "--channels", "3", "--steps", "2", "--batch-size", "4"]
    assert main(["train-vqvae", "--run", "my", "--data", "pictures", *model, "--validation", "0.2", *quiet]) == 0
    assert main(["extract", "--run", "my", *quiet]) == 0

    script.main(["vary", "my", "pictures", "copies.npz"])
    stored = np.load("copies.npz")
    each = len(fastvq.data.CodeDataset("my/codes/train"))
    assert np.bincount(stored["kinds"]).tolist() == [each * copies for copies, _ in script.KINDS.values()]
    codes = fastvq.data.CodeDataset("my/codes/train")
    for number in (0, 1):
        own = codes.codes(number, np.arange(each))
        assert torch.equal(torch.from_numpy(stored[f"level{number}"][:each]).long(), own)
    settings = ["--preset", "tiny", "--dropout", "0"]
    for level in ("0", "1"):
        options = ["--batch-size", "8", "--own", "0.2", "--similar", "0.1", "--similar-above", "0.1", *settings]
        first, second = f"{level}.safetensors", f"more{level}.safetensors"
        script.main(["train", "my", "copies.npz", level, first, "--steps", "3", *options])
        script.main(["train", "my", "copies.npz", level, second, "--steps", "2", "--init", first, *options])
        script.main(["keep", "my", level, second, *settings])
    pipeline = fastvq.Pipeline.from_pretrained("my")
    told = [fastvq.models.load_pretrained(f"my/prior{level}/model") for level in (0, 1)]
    assert [prior.config.num_classes for prior in told] == [2, 2]
    assert pipeline.sample(3, label=1, seed=0).images.shape == (3, 3, 16, 16)
