"""Commands that use a model: in-painting, samples like an image, several classes, and animated pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import pipeline_of
from safetensors.torch import load_file

from fastvq import Pipeline
from fastvq.cli import main
from fastvq.data import box_region, image_grid, load_picture, save_grid
from fastvq.data.grid import grid_size

pytestmark = pytest.mark.usefixtures("steady")
SAMPLE = ["sample", "--pretrained", "digits", "--quiet", "--seed", "3"]
INPAINT = ["inpaint", "--pretrained", "digits", "--quiet", "--seed", "3"]


@pytest.fixture(scope="module")
def digits() -> Pipeline:
    return Pipeline.from_pretrained("digits")


@pytest.fixture(scope="module")
def seven(digits: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seven of 64 x 40 pixels, whose upper 12 and lower 12 rows are cropped away."""
    path = tmp_path_factory.mktemp("images") / "seven.png"
    picture = digits.sample(1, label=7, seed=0).images
    pixels = image_grid(torch.nn.functional.interpolate(picture, (64, 40), mode="bicubic"), padding=0)
    Image.fromarray(pixels).save(path)
    return path


def written(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_box_is_painted(digits: Pipeline, seven: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.png"
    command = [*INPAINT, "--image", str(seven), "--box", "0", "32", "40", "32", "--out", str(out)]
    assert main([*command, "--label", "7", "-n", "3", "--temperature", "0.9", "0.5"]) == 0
    image, mask = load_picture(seven, (32, 32), channels=1), box_region(seven, (0, 32, 40, 32), (32, 32))
    assert mask[16:].all()
    assert not mask[:16].any()
    found = digits.inpaint(image, mask, 3, label=7, seed=3, temperature=[0.9, 0.5])
    shown = torch.cat([image, image.masked_fill(mask, 0), found.images])
    assert np.array_equal(written(out), image_grid(shown, 5, captions=["image", "kept", *["painted"] * 3]))
    kept = out.read_bytes()
    assert main([*command, "--label", "7"]) == 1
    assert out.read_bytes() == kept


@pytest.mark.parametrize(
    ("more", "columns", "rows", "captions"),
    [
        (["-n", "12"], 12, 2, [*"0123456789"]),
        (["-n", "4", "--label", "3", "8"], 4, 2, ["3", "8"]),
        (["-n", "9", "--label", "3"], 10, 2, ["painted"] * 8),
        (["--label", "3"], 10, 1, ["painted"] * 8),
    ],
    ids=["all", "two", "one", "default"],
)
def test_results_have_a_column_for_each_class(
    more: list[str], columns: int, rows: int, captions: list[str], seven: Path, tmp_path: Path
) -> None:
    out = tmp_path / "i.png"
    region = ["--image", str(seven), "--box", "0", "32", "40", "32", "--rounds", "1"]
    assert main([*INPAINT, *region, *more, "--out", str(out)]) == 0
    size = grid_size(columns * rows, 32, 32, columns, captions=["image", "kept", *captions])[:2]
    pixels = written(out)
    assert pixels.shape == size
    beside = pixels[2 + 34 : 2 + 34 * rows, : 2 * 34]
    assert (beside == 255).all()


def test_a_mask_picture_and_a_folder(digits: Pipeline, seven: Path, tmp_path: Path) -> None:
    pixels = np.zeros((64, 40), np.uint8)
    pixels[32:, :] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    command = [*INPAINT, "--image", str(seven), "--mask", str(tmp_path / "mask.png"), "-n", "3"]
    assert main([*command, "--margin", "1", "--no-paste", "--out", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert settings["labels"] == [0, 1, 2]
    said = {"image": str(seven), "mask": str(tmp_path / "mask.png"), "margin": 1, "rounds": 2, "paste": False}
    assert said.items() <= settings.items()
    image, mask = load_picture(seven, (32, 32), channels=1), box_region(seven, (0, 32, 40, 32), (32, 32))
    found = digits.inpaint(image, mask, 3, label=[0, 1, 2], seed=3, margin=1, paste=False)
    codes = load_file(tmp_path / "out" / "codes.safetensors")
    assert all(torch.equal(codes[f"level{level}"], grid) for level, grid in enumerate(found.codes))
    assert np.array_equal(written(tmp_path / "out" / "000001.png"), image_grid(found.images[1:2], padding=0))


def test_samples_like_an_image(digits: Pipeline, seven: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*SAMPLE, "--like", str(seven), "--label", "7", "-n", "4", "--out", str(out)]) == 0
    top = digits.encode(load_picture(seven, (32, 32), channels=1))[0]
    codes = load_file(out / "codes.safetensors")
    assert torch.equal(codes["level0"], top.expand(4, -1, -1))
    found = digits.sample(4, label=7, codes=[top], seed=3)
    assert torch.equal(codes["level1"], found.codes[1])
    settings = json.loads((out / "samples.json").read_text())
    assert (settings["like"], settings["keep_levels"]) == (str(seven), 1)
    assert (
        main([*SAMPLE, "--like", str(seven), "--keep-levels", "1", "--label", "7", "-n", "4", "--out", f"{out}.png"])
        == 0
    )
    assert np.array_equal(written(tmp_path / "out.png"), image_grid(found.images))


@pytest.mark.parametrize(
    ("n", "label", "names"),
    [
        (11, [], [*"0123456789"]),
        (3, [], [*"012"]),
        (5, ["4", "2"], ["4", "2"]),
        (5, ["4"], None),
    ],
    ids=["all", "fewer-than-classes", "two", "one"],
)
def test_samples_have_a_column_for_each_class(
    n: int, label: list[str], names: list[str] | None, digits: Pipeline, tmp_path: Path
) -> None:
    asked = ["--label", *label] if label else []
    assert main([*SAMPLE, "-n", str(n), *asked, "--out", str(tmp_path / "s.png")]) == 0
    images = digits.sample(n, label=[int(one) for one in label] or range(10), seed=3).images
    columns = None if names is None else len(names)
    assert np.array_equal(written(tmp_path / "s.png"), image_grid(images, columns, captions=names))
    assert main([*SAMPLE, "-n", str(n), *asked, "--out", str(tmp_path / "s")]) == 0
    settings = json.loads((tmp_path / "s" / "samples.json").read_text())
    turns = [int(name) for name in label] or [*range(10)]
    assert settings["labels"] == [turns[index % len(turns)] for index in range(n)]
    assert settings["class_names"] == [*"0123456789"]


@pytest.mark.parametrize(("like", "frames"), [(False, 1 + 4 + 16), (True, 1 + 16)], ids=["all", "below-the-top"])
@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_an_animated_picture_ends_with_the_samples(
    name: str, like: bool, frames: int, seven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SAMPLE, "-n", "3", *(["--like", str(seven)] if like else [])]
    files = ["--out", str(tmp_path / "s.png"), "--animate", str(tmp_path / name)]
    assert main([*command, *files]) == 0
    assert f"the grids being filled in {tmp_path / name}" in capsys.readouterr().out
    with Image.open(tmp_path / name) as animated:
        assert animated.n_frames == frames
        animated.seek(frames - 1)
        assert np.array_equal(np.asarray(animated.convert("L")), written(tmp_path / "s.png"))
    assert main([*command, *files[2:], "--out", str(tmp_path / "again.png")]) == 1
    assert capsys.readouterr().err.startswith(f"fastvq: error: --animate: {tmp_path / name} exists already")
    assert not (tmp_path / "again.png").exists()


def test_a_single_level_leaves_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline_of(1, num_classes=None).save_pretrained(tmp_path / "one")
    save_grid(tmp_path / "a.png", torch.zeros(1, 1, 4, 6), padding=0)
    command = ["sample", "--checkpoint", str(tmp_path / "one"), "--out", str(tmp_path / "s.png")]
    assert main([*command, "--like", str(tmp_path / "a.png")]) == 1
    said = "--like: this model has a single level, so nothing would be left to draw"
    assert said in capsys.readouterr().err
    assert main([*command, "--label", "1", "2"]) == 1
    assert "--label: this model knows no classes, got 1 2" in capsys.readouterr().err
