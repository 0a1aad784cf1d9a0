"""Data: image folders good and broken, digits, splits, augmentation, grids."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.data import Augment, Digits, ImageFolder, image_grid, load_images, psnr, save_grid, split_indices
from fastvq.data.base import permutation
from fastvq.data.grid import grid_size
from fastvq.data.images import ImageFolderWarning
from fastvq.errors import (
    ArgumentError,
    ArgumentTypeError,
    CorruptFileError,
    FileConflictError,
    MissingFileError,
    UnavailableError,
)


def picture(width: int = 12, height: int = 12, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def only_pixel_values(folder: Path, **options: Any) -> list[float]:
    """Channel values of the one, single-coloured image in a folder, back on the scale 0..255."""
    image = ImageFolder(folder, 4, **options).image(0)
    assert image.dtype == torch.float32
    assert torch.equal(image, image[:, :1, :1].expand_as(image))
    return ((image[:, 0, 0] + 1) * 127.5).round(decimals=2).tolist()


# ---- Image folders


def test_labels_come_from_first_level_folders(tmp_path: Path) -> None:
    for name in ("dog/2.png", "cat/deep/er/1.JPG", "cat/b.WebP", "ant/x.jpeg"):
        save(picture(), tmp_path / name, format={"j": "JPEG", "w": "WEBP", "p": "PNG"}[name.split(".")[1][0].lower()])
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._b.png").write_text("what some systems leave behind")
    with pytest.warns(ImageFolderWarning, match=r"left out of .*: 1 hidden; 1 other files \(.txt\)$"):
        data = ImageFolder(tmp_path, 8)
    assert [path.relative_to(tmp_path).as_posix() for path in data.paths] == [
        "ant/x.jpeg",
        "cat/b.WebP",
        "cat/deep/er/1.JPG",
        "dog/2.png",
    ]
    assert data.class_names == ("ant", "cat", "dog")
    assert data.num_classes == 3
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1, 2]
    assert data.labels.dtype == torch.int64
    assert len(data) == 4
    assert data.image(0).shape == (3, 8, 8)
    assert data.skipped == []


def test_images_in_the_root_have_no_labels(tmp_path: Path) -> None:
    save(picture(), tmp_path / "1.png")
    data = ImageFolder(tmp_path, 8)
    assert (data.labels, data.class_names, data.num_classes) == (None, (), None)
    save(picture(), tmp_path / "sub" / "2.png")
    with pytest.warns(UserWarning, match="1 of 2 images lie directly in"):
        assert ImageFolder(tmp_path, 8).labels is None


@pytest.mark.parametrize(
    ("mode", "colour", "rgb", "grey"),
    [
        ("RGB", (255, 0, 51), [255, 0, 51], 82),
        ("L", 77, [77, 77, 77], 77),
        ("1", 1, [255, 255, 255], 255),
        ("RGBA", (255, 0, 0, 255), [255, 0, 0], 76),
        ("RGBA", (255, 0, 0, 0), [255, 255, 255], 255),
        ("LA", (0, 127), [128, 128, 128], 128),
        ("I;16", 257 * 200, [200, 200, 200], 200),
        ("I;16", 65535, [255, 255, 255], 255),
    ],
)
def test_png_modes(mode: str, colour: Any, rgb: list[int], grey: int, tmp_path: Path) -> None:
    save(Image.new(mode, (6, 6), colour), tmp_path / "1.png")
    assert only_pixel_values(tmp_path) == rgb
    assert only_pixel_values(tmp_path, channels=1) == [grey]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    save(image, tmp_path / "a" / "1.png")
    assert only_pixel_values(tmp_path / "a") == [10, 20, 30]
    save(image, tmp_path / "b" / "1.png", transparency=1)
    assert only_pixel_values(tmp_path / "b") == [255, 255, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "1.jpg", quality=100)
    red, green, blue = only_pixel_values(tmp_path)
    assert red > 240
    assert max(green, blue) < 15


def test_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # left half white; orientation 6 (turn right by 90 degrees) brings it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    save(Image.fromarray(pixels), tmp_path / "1.png", exif=exif)
    image = ImageFolder(tmp_path, 8, channels=1).image(0)[0]
    assert (image[:3] > 0.9).all()
    assert (image[5:] < -0.9).all()


@pytest.mark.parametrize(("width", "height"), [(30, 10), (10, 30)])
def test_crops_the_centre(width: int, height: int, tmp_path: Path) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[(height - 10) // 2 : (height + 10) // 2, (width - 10) // 2 : (width + 10) // 2] = 255
    save(Image.fromarray(pixels), tmp_path / "1.png")
    assert torch.equal(ImageFolder(tmp_path, 10).image(0), torch.ones(3, 10, 10))


def test_size_of_two_numbers_and_exact_pixels(tmp_path: Path) -> None:
    source = picture(12, 8)
    save(source, tmp_path / "1.png")
    data = ImageFolder(tmp_path, (8, 12))
    assert data.size == (8, 12)
    expected = torch.from_numpy(np.array(source)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(data.image(0), expected)
    image = ImageFolder(tmp_path, (4, 6)).image(0)
    resized = np.array(source.resize((6, 4), Image.Resampling.BICUBIC))
    assert torch.equal(image, torch.from_numpy(resized).permute(2, 0, 1).float() / 127.5 - 1)


def test_cache_changes_nothing(tmp_path: Path) -> None:
    for index in range(5):
        save(picture(seed=index), tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"")
    plain, cached = (_quietly(tmp_path, cache=cache) for cache in (False, True))
    assert len(cached) == 4
    assert torch.equal(load_images(plain, range(4)), load_images(cached, range(4)))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert cached.image(3).shape == (3, 8, 8)
    with pytest.raises(ArgumentError, match="cache"):
        ImageFolder(tmp_path, 8, cache=True, check="header")


def _quietly(folder: Path, **options: Any) -> ImageFolder:
    with pytest.warns(UserWarning, match="going on without them"):
        return ImageFolder(folder, 8, skip_broken=True, **options)


def test_fingerprint(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        save(picture(), tmp_path / name)
    first = ImageFolder(tmp_path, 8).fingerprint()
    assert ImageFolder(tmp_path, 8, check="header", cache=False).fingerprint() == first
    assert ImageFolder(tmp_path, 4).fingerprint() != first
    assert ImageFolder(tmp_path, 8, channels=1).fingerprint() != first
    (tmp_path / "a").rename(tmp_path / "c")
    assert ImageFolder(tmp_path, 8).fingerprint() != first


def test_links_that_form_a_loop(tmp_path: Path) -> None:
    save(picture(), tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    data = ImageFolder(tmp_path, 8)
    names = [path.relative_to(tmp_path).as_posix() for path in data.paths]
    assert names == ["a/1.png", "b/1.png"]
    assert data.class_names == ("a", "b")


# ---- Broken and unwanted files


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Two good images and one of each kind of bad file."""
    save(picture(), tmp_path / "good" / "1.png")
    save(picture(), tmp_path / "good" / "2.jpg")
    bad = tmp_path / "bad"
    whole = save(picture(64, 64), tmp_path / "good" / "3.jpg").read_bytes()
    (tmp_path / "good" / "3.jpg").unlink()
    bad.mkdir()
    (bad / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.webp").write_text("hello")
    save(picture(), bad / "eps.png", format="EPS")  # Pillow would call another program
    (bad / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(bad / "pipe.png")
    save(picture(200, 200), bad / "huge.png")
    return tmp_path


REASONS = {
    "truncated.jpg": "truncated",
    "empty.png": "not an image of a type that is read",
    "text.webp": "not an image of a type that is read",
    "eps.png": "not an image of a type that is read",
    "dangling.png": "No such file",
    "pipe.png": "not a regular file",
    "huge.png": "200 x 200 = 40000 pixels, more than the limit 10000",
}


def test_report_names_every_bad_file(broken: Path) -> None:
    with pytest.raises(CorruptFileError, match="7 of 9 images cannot be read; skip_broken=True") as caught:
        ImageFolder(broken, 8, max_pixels=10000)
    for name, reason in REASONS.items():
        assert re.search(f"bad/{name}: .*{reason}", str(caught.value)), name


def test_skipping_bad_files(broken: Path) -> None:
    with pytest.warns(UserWarning, match="7 of 9 images cannot be read; going on without them") as caught:
        data = ImageFolder(broken, 8, skip_broken=True, max_pixels=10000)
    assert len(caught) == 1
    assert sorted(path.name for path, _ in data.skipped) == sorted(REASONS)
    for path, reason in data.skipped:
        assert REASONS[path.name] in reason
    assert [path.name for path in data.paths] == ["1.png", "2.jpg"]
    assert data.class_names == ("bad", "good")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 1]


def damage_inside(path: Path) -> None:
    """Change bytes of a PNG's pixels, and neither its header nor its end."""
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 4] = bytes(255 - value for value in whole[middle : middle + 4])
    path.write_bytes(whole)


def test_header_check_leaves_damage_inside_for_later(broken: Path) -> None:
    damage_inside(save(picture(64, 64), broken / "bad" / "inside.png"))
    with pytest.warns(UserWarning, match="7 of 10"):
        data = ImageFolder(broken, 8, skip_broken=True, max_pixels=10000, check="header")
    assert [path.name for path in data.paths] == ["inside.png", "1.png", "2.jpg"]
    with pytest.raises(CorruptFileError, match=r"inside.png: ") as caught:
        data.image(0)
    assert caught.value.__notes__ == [data.damage_note]
    with pytest.warns(UserWarning, match="8 of 10"):
        ImageFolder(broken, 8, skip_broken=True, max_pixels=10000)


def test_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "1.png")
    data = ImageFolder(tmp_path, 8)
    path.unlink()
    with pytest.raises(CorruptFileError, match="1.png: No such file"):
        data.image(0)


@pytest.mark.parametrize("skip", [False, True])
def test_nothing_but_broken_files(skip: bool, tmp_path: Path) -> None:
    for index in range(23):
        (tmp_path / f"{index:02d}.png").write_text("x")
    with pytest.raises(CorruptFileError, match="23 of 23 images") as caught:
        ImageFolder(tmp_path, 8, skip_broken=skip)
    assert "19.png" in str(caught.value)
    assert "20.png" not in str(caught.value)
    assert str(caught.value).endswith("... and 3 more")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [143, 71])  # Pillow warns just above its limit and raises at twice that
def test_pillows_limit_stays_on(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(picture(12, 12), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(CorruptFileError, match=r"bomb.png: .*144.*pixels"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(CorruptFileError, match=r"bomb.png"):
        ImageFolder(tmp_path, 8, check="header", max_pixels=10**9)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"root: .*nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(MissingFileError, match=r"root: no image in .* or its sub-folders$"):
        ImageFolder(tmp_path, 8)
    file = save(picture(), tmp_path / "1.png")
    with pytest.raises(MissingFileError, match="is a file, expected a folder"):
        ImageFolder(file, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ArgumentError, "size: must be at least 1"),
        ({"size": 8.0}, ArgumentTypeError, "size: expected an int or a pair"),
        ({"size": (8, 8, 8)}, ArgumentTypeError, "size: expected an int or a pair"),
        ({"size": 8, "channels": 2}, ArgumentError, "channels: expected 1 or 3"),
        ({"size": 8, "check": "none"}, ArgumentError, "check: expected one of 'decode', 'header'"),
        ({"size": 8, "suffixes": ".png"}, ArgumentTypeError, "suffixes: expected a list of endings"),
        ({"size": 8, "suffixes": ["png"]}, ArgumentError, "suffixes: expected endings such as '.png'"),
        ({"size": 8, "empty_classes": "keep"}, ArgumentError, "empty_classes: expected one of"),
        ({"size": 8, "max_pixels": 0}, ArgumentError, "max_pixels: must be at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    save(picture(), tmp_path / "1.png")
    with pytest.raises(error, match=message):
        ImageFolder(tmp_path, **options)


# ---- Digits


def test_digits() -> None:
    data = Digits(16)
    assert len(data) == 1797
    assert data.image(0).shape == (1, 16, 16)
    images = load_images(data, range(1797))
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert 0.9 < images.max() <= 1
    assert data.class_names == tuple("0123456789")
    assert data.labels is not None
    assert torch.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.fingerprint() == Digits(16).fingerprint() != Digits((16, 8)).fingerprint()
    data.image(0).fill_(5)
    assert data.image(0).max() <= 1


def test_digits_at_their_own_size_are_the_original() -> None:
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().images).float() / 8 - 1
    torch.testing.assert_close(load_images(Digits(8), range(1797))[:, 0], original, rtol=0, atol=1e-6)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UnavailableError, match=re.escape('pip install "fastvq[demo]"')):
        Digits()


def test_optional_packages_are_not_imported() -> None:
    code = (
        "import sys, fastvq.data, fastvq.training; print([m for m in ('sklearn', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- Splits


@pytest.mark.parametrize(("n", "fraction", "held_out"), [(100, 0.1, 10), (5, 0.01, 1), (7, 0.0, 0), (2, 0.9, None)])
def test_split(n: int, fraction: float, held_out: int | None) -> None:
    if held_out is None:
        with pytest.raises(ArgumentError, match="leaves nothing to train on"):
            split_indices(n, fraction, 0)
        return
    training, validation = split_indices(n, fraction, 3)
    assert len(validation) == held_out
    assert sorted([*training, *validation]) == list(range(n))
    assert (np.diff(training) > 0).all()
    assert (np.diff(validation) > 0).all()
    again = split_indices(n, fraction, 3)
    assert np.array_equal(training, again[0])
    if held_out > 1:
        assert not np.array_equal(validation, split_indices(n, fraction, 4)[1])


def test_split_is_the_same_on_every_machine() -> None:
    """Fixed numbers: a split that moved would leak validation images into training when a run goes on elsewhere."""
    assert split_indices(20, 0.2, 0)[1].tolist() == [6, 14, 17, 18]
    assert permutation(6, 1, 2, 1).tolist() == [4, 5, 1, 0, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 0.1, 0), "n"), ((5, 1.0, 0), "fraction"), ((5, -0.1, 0), "fraction"), ((5, 0.1, -1), "seed")],
)
def test_bad_splits(arguments: tuple[int, float, int], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        split_indices(*arguments)


# ---- Augmentation


def test_augmented_images_against_padding_and_cropping() -> None:
    """Every variant is one of the (2 m + 1)^2 * 2 crops of the edge-padded image, and all of them occur."""
    image = torch.rand(3, 5, 7)
    padded = torch.nn.functional.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    crops = [padded[:, y : y + 5, x : x + 7] for y in range(3) for x in range(3)]
    crops += [crop.flip(-1) for crop in crops]
    augment = Augment(max_shift=1, horizontal_flip=True)
    seen = [
        [torch.equal(augment(image, seed=2, index=1, variant=variant), crop) for crop in crops].index(True)
        for variant in range(1, 300)
    ]
    counts = np.bincount(seen, minlength=18)
    assert (counts > 3).all()
    assert counts.max() < 40


def test_augmentation_depends_on_seed_index_and_variant_alone() -> None:
    images = torch.rand(6, 1, 6, 6)
    augment = Augment(2, True)
    indices, variants = np.array([4, 9, 4, 0, 2**33, 4]), np.array([1, 1, 2, 0, 3, 1])
    batch = augment.batch(images, seed=7, indices=indices, variants=variants)
    for b in range(6):
        torch.manual_seed(b)
        single = augment(images[b], seed=7, index=int(indices[b]), variant=int(variants[b]))
        assert torch.equal(batch[b], single)
    assert torch.equal(batch[3], images[3])

    def drawn(seed: int) -> list[bytes]:
        ramp = torch.arange(36.0).view(1, 6, 6)
        return [augment(ramp, seed=seed, index=i, variant=v).numpy().tobytes() for i in range(10) for v in (1, 2)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 8


def test_augmentation_that_does_nothing_and_bad_ones() -> None:
    image = torch.rand(1, 4, 4)
    assert torch.equal(Augment()(image, seed=0, index=0, variant=5), image)
    with pytest.raises(ArgumentError, match="max_shift: must be at least 0"):
        Augment(-1)
    with pytest.raises(ArgumentTypeError, match="horizontal_flip"):
        Augment(1, "yes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="max_shift: 4 is not smaller than the image"):
        Augment(4)(image, seed=0, index=0, variant=1)
    with pytest.raises(ArgumentError, match="must not be negative, got -1 and 1 as the least"):
        Augment(1)(image, seed=0, index=-1, variant=1)
    with pytest.raises(ArgumentError, match=r"expected shape \(1,\)"):
        Augment(1).batch(image[None], seed=0, indices=np.arange(2), variants=np.ones(2, int))
    with pytest.raises(ArgumentError, match=r"image: expected shape \[C, H, W\]"):
        Augment(1)(image[0], seed=0, index=0, variant=1)


# ---- Grids


def test_grid_layout() -> None:
    images = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 5.0)])
    grid = image_grid(images, columns=2, padding=1)
    assert grid.shape == (2 * 3 + 1, 2 * 4 + 1)
    assert grid.dtype == np.uint8
    assert (grid[1:3, 1:4] == 0).all()
    assert (grid[1:3, 5:8] == 128).all()
    grid[1:3, 1:8] = 255
    assert (grid == 255).all()
    assert image_grid(torch.zeros(5, 3, 2, 2)).shape == (2 * 4 + 2, 3 * 4 + 2, 3)
    assert image_grid(torch.full((1, 1, 1, 1), float("nan")), padding=0).tolist() == [[128]]


def test_captions_stand_under_their_columns() -> None:
    images = torch.zeros(4, 3, 20, 30)
    plain = image_grid(images, columns=2)
    grid = image_grid(images, columns=2, captions=["ab", "c"])
    assert grid.shape[:2] == grid_size(4, 20, 30, 2, captions=["ab", "c"])[:2]
    assert np.array_equal(grid[: len(plain)], plain)
    below = grid[len(plain) :] < 128
    assert below[:, 2:32].any()
    assert below[:, 34:64].any()
    assert not below[:, :2].any()
    assert not below[:, 32:34].any()
    # Both are turned where one is too wide, and nothing of them is lost.
    upright = image_grid(images, columns=2, captions=["a" * 30, "c"])
    assert upright.shape[0] - len(plain) > 100
    assert (upright[len(plain) :, 2:32] < 128).any(1).sum() > 100
    assert image_grid(images[:, :1], columns=2, captions=["", "c"]).shape == grid.shape[:2]


def test_grid_file_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_grid(tmp_path / "new" / "grid.png", torch.zeros(1, 3, 4, 4), padding=0)
    assert np.array(Image.open(path)).shape == (4, 4, 3)
    first = path.read_bytes()
    with pytest.raises(FileConflictError, match=r"grid.png exists already"):
        save_grid(path, torch.ones(1, 3, 4, 4))
    assert path.read_bytes() == first
    save_grid(path, torch.ones(1, 3, 4, 4), overwrite=True)
    second = path.read_bytes()
    assert second != first

    def fail(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:4])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_grid(path, torch.zeros(1, 3, 4, 4), overwrite=True)
    assert path.read_bytes() == second
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (torch.zeros(3, 4, 4), {}, ArgumentError, r"images: expected shape \[N, C, H, W\]"),
        (torch.zeros(0, 3, 4, 4), {}, ArgumentError, "at least one image"),
        (torch.zeros(1, 2, 4, 4), {}, ArgumentError, "1 or 3 channels"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {}, ArgumentTypeError, "floating-point"),
        (torch.zeros(1, 3, 4, 4), {"columns": 0}, ArgumentError, "columns: must be at least 1"),
        (torch.zeros(2, 3, 4, 4), {"captions": ["a"]}, ArgumentError, "captions: expected 2, one per column, got 1"),
        ("picture", {}, ArgumentTypeError, r"images: expected a torch.Tensor"),
    ],
)
def test_bad_grids(images: Any, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        save_grid(tmp_path / "grid.png", images, **options)
    assert not list(tmp_path.iterdir())


def test_grid_name(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"path: expected a name that ends in .png, .jpg"):
        save_grid(tmp_path / "grid.gif", torch.zeros(1, 3, 4, 4))


def test_psnr() -> None:
    assert psnr(4.0) == 0
    assert psnr(0.04) == pytest.approx(20)
    assert psnr(0.0) == float("inf")
    assert psnr(float("inf")) == -float("inf")  # of a model that has diverged
