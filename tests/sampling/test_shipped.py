"""The models inside the package: what they are, and that the colour one has learned what its classes look like."""

from __future__ import annotations

import dataclasses

import pytest

from fastvq import Pipeline
from fastvq.models import PRESETS, VQVAEConfig
from fastvq.sampling import shipped


def test_these_models_ship() -> None:
    assert sorted(shipped()) == ["digits", "emoji"]


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_a_model_that_ships_is_small_and_loads(name: str) -> None:
    files = [path for path in shipped()[name].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 25_000_000
    pipeline = Pipeline.from_pretrained(name)
    assert len(pipeline.class_names or ()) == pipeline.num_classes == {"digits": 10, "emoji": 9}[name]
    assert not pipeline.vqvae.training


def test_the_emoji_are_those_of_their_presets() -> None:
    pipeline = Pipeline.from_pretrained("emoji")
    for name, model in zip(("emoji", "emoji-top", "emoji-bottom"), (pipeline.vqvae, *pipeline.priors), strict=True):
        preset = PRESETS[name][1]
        if isinstance(preset, VQVAEConfig):
            # It was trained when presets had it so.
            preset = dataclasses.replace(preset, codebook_init="kmeans")
        assert model.config == preset


@pytest.mark.usefixtures("one_thread")
def test_smileys_are_yellow_and_corners_white() -> None:
    images = Pipeline.from_pretrained("emoji").sample(8, label="smileys-emotion", temperature=0.8, seed=1).images
    assert images.shape == (8, 3, 64, 64)
    red, green, blue = images[:, :, 20:44, 20:44].mean((0, 2, 3)).tolist()
    assert red > 0.3
    assert green > 0.0
    assert blue < -0.2
    corners = images[:, :, [0, 0, 63, 63], [0, 63, 0, 63]]
    assert (corners.mean(1) > 0.9).float().mean() > 0.9
