"""Where a box or a mask of a picture's file lies in the picture as a model sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refuses
from PIL import Image

from fastvq.data import ImageFolder, box_region, load_picture, mask_region
from fastvq.errors import ArgumentError, CorruptFileError, MissingFileError

WIDTH, HEIGHT = 60, 40
BOX = (20, 10, 15, 8)  # x, y, width, height


def drawn(path: Path, *, orientation: int | None = None) -> Path:
    """A black picture with BOX in white; stored turned, with EXIF that turns it back."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[BOX[1] : BOX[1] + BOX[3], BOX[0] : BOX[0] + BOX[2]] = 255
    picture, exif = Image.fromarray(pixels), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        picture = picture.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation])
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", [None, 3, 6], ids=["upright", "upside-down", "on-its-side"])
@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((40, 60), (10, 18), (20, 35)),
        ((20, 30), (5, 9), (10, 18)),  # half: 17.5 is touched
        ((80, 120), (20, 36), (40, 70)),
        ((40, 40), (10, 18), (10, 25)),  # ten pixels are cropped at the left
        ((20, 20), (5, 9), (5, 13)),
    ],
    ids=str,
)
def test_a_box_is_where_the_picture_shows_it(
    orientation: int | None, size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], tmp_path: Path
) -> None:
    path = drawn(tmp_path / "a.png", orientation=orientation)
    expected = torch.zeros(size, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(box_region(path, BOX, size), expected)
    assert torch.equal(mask_region(path, drawn(tmp_path / "mask.png"), size), expected)
    shown = load_picture(path, size, channels=1)
    assert shown.shape == (1, 1, *size)
    assert bool((shown[0, 0][~expected] < 0).all())
    inside = shown[0, 0][expected]
    assert (inside > 0).float().mean() > 0.8


def test_a_pixel_of_a_large_picture_is_not_lost(tmp_path: Path) -> None:
    Image.new("L", (3000, 3000)).save(tmp_path / "a.png")
    region = box_region(tmp_path / "a.png", (1500, 700, 1, 1), (32, 32))
    assert region.nonzero().tolist() == [[7, 16]]


def test_a_picture_is_that_of_a_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(load_picture(tmp_path / "a.png", (4, 4))[0], ImageFolder(tmp_path, 4).image(0))


def test_what_counts_as_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 4, 4), np.uint8)
    pixels[0, :, 3] = (255, 255, 255, 0)
    pixels[0, 0, :3], pixels[0, 1, :3] = 127, 128
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    Image.new("RGB", (4, 1)).save(tmp_path / "a.png")
    assert mask_region(tmp_path / "a.png", tmp_path / "mask.png", (1, 4)).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 0, 0, 4), (0, 0, 4, 0), (57, 0, 4, 4), (0, 37, 4, 4)], ids=str)
def test_boxes_lie_in_the_picture(box: tuple[int, int, int, int], tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.png", orientation=6)
    got = " ".join(map(str, box))
    with refuses(
        ArgumentError, f"box: expected X Y WIDTH HEIGHT of a box in .*a.png, 60 .* wide and 40 high; got {got}"
    ):
        box_region(path, box, (8, 8))


def test_regions_that_are_cropped_away(tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.png")
    with refuses(
        ArgumentError, "box: all of it is cropped away; of the picture the middle is used, of the shape 8 : 8"
    ):
        box_region(path, (0, 0, 10, 40), (8, 8))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with refuses(ArgumentError, "mask: all of it is cropped away"):
        mask_region(path, tmp_path / "mask.png", (8, 8))


def test_masks_and_files_that_do_not_fit(tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.png")
    Image.new("L", (40, 60), 255).save(tmp_path / "turned.png")
    Image.new("L", (60, 40), 127).save(tmp_path / "grey.png")
    (tmp_path / "words.png").write_text("words")
    with refuses(ArgumentError, r"mask: expected 60 x 40 pixels as .*a.png has, got 40 x 60"):
        mask_region(path, tmp_path / "turned.png", (8, 8))
    with refuses(ArgumentError, r"mask: .*grey.png is black all over; white says what to paint"):
        mask_region(path, tmp_path / "grey.png", (8, 8))
    with refuses(MissingFileError, r"mask: no file .*absent.png"):
        mask_region(path, tmp_path / "absent.png", (8, 8))
    with refuses(MissingFileError, r"image: no file .*absent.png"):
        load_picture(tmp_path / "absent.png", (8, 8))
    with refuses(CorruptFileError, r".*words.png: not an image of a type that is read"):
        load_picture(tmp_path / "words.png", (8, 8))
