"""Which files count as images, what is said of the others, and pixels that damaged metadata do not touch."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fastvq.data import ImageFolder
from fastvq.data.images import ImageFolderWarning
from fastvq.data.pictures import formats_of, picture_types
from fastvq.errors import CorruptFileError, MissingFileError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def save(path: Path, *, pixels: np.ndarray = PIXELS, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def values(folder: Path, size: int = 8, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C] of the only image of a folder."""
    data = ImageFolder(folder, size, channels=channels)
    assert len(data) == 1
    return ((data.image(0) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


# ---- Which files count


@pytest.mark.parametrize("name", ["a.bmp", "a.tif", "a.TIFF", "a.ppm", "a.tga", "a.jp2", "a.qoi"])
def test_exact_types_are_read(name: str, tmp_path: Path) -> None:
    options = {"irreversible": False} if name.endswith("jp2") else {}
    save(tmp_path / name, **options)
    assert (values(tmp_path) == PIXELS).all()


@pytest.mark.parametrize("suffix", ["jfif", "jpe"])
def test_jpeg_under_its_other_names(suffix: str, tmp_path: Path) -> None:
    save(tmp_path / "a" / f"x.{suffix}", format="JPEG")
    save(tmp_path / "b" / "x.jpg", format="JPEG")
    assert (values(tmp_path / "a") == values(tmp_path / "b")).all()


def test_types_that_do_not_count() -> None:
    """One runs another program, some need a plug-in, some are film, the endings of others mean other things."""
    types = picture_types()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".jpe"} <= types.keys()
    assert types.keys().isdisjoint({".eps", ".ps", ".mpg", ".h5", ".wmf", ".fits", ".pcd", ".pdf", ".pfm"})
    assert formats_of((".jpg", ".jpeg", ".png", ".webp")) == ("JPEG", "PNG", "WEBP")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / f"a.{kind.lower()}", kind, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(ImageFolderWarning, match=rf"1 files hold several frames, .* first is read: a.{kind.lower()}$"):
        assert (values(tmp_path) == (255, 0, 0)).all()


def test_what_is_left_out_is_said_once(tmp_path: Path) -> None:
    save(tmp_path / "ant" / "1.png")
    for index in range(5):
        (tmp_path / "ant" / f"{index}.heic").write_bytes(b"")
    for name in ("notes.txt", "more.txt", "sizes.json", ".DS_Store"):
        (tmp_path / name).write_text("x")
    for name in ("config.json", "checkpoints/x", "images/r.png"):
        save(tmp_path / "run" / "vqvae" / name, format="PNG")
    (tmp_path / "run" / "data.json").write_text("{}")
    with pytest.warns(ImageFolderWarning) as caught:
        data = ImageFolder(tmp_path, 8)
    assert [str(one.message) for one in caught] == [
        f"left out of {tmp_path}: 5 .heic (ant/0.heic, ant/1.heic, ant/2.heic, ...), not a type of picture that is "
        "read; run, a folder that fastvq wrote; 1 hidden; 3 other files (.txt, .json)"
    ]
    assert data.class_names == ("ant",)
    assert len(data.left_out) == 10


@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "logs/a.png"],
        ["data.json", "vqvae/a.png"],
        ["samples.json", "codes.safetensors", "000000.png"],
        ["evaluation.json", "README.md", "samples.png"],
        ["pipeline.json", "a.png"],
    ],
    ids=lambda files: files[0],
)
def test_folders_that_fastvq_wrote_are_no_class(files: list[str], tmp_path: Path) -> None:
    save(tmp_path / "ant" / "1.png")
    for name in files:
        save(tmp_path / "mine" / name, format="PNG")
    with pytest.warns(ImageFolderWarning, match="mine, a folder that fastvq wrote"):
        assert ImageFolder(tmp_path, 8).class_names == ("ant",)


def test_classes_without_an_image_are_refused_or_left_out(tmp_path: Path) -> None:
    for name in ("ant/1.png", "cow/1.png"):
        save(tmp_path / name)
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / "1.heic").write_bytes(b"")
    with pytest.raises(MissingFileError, match=r"root: no image in bee of .*left out: 1 .heic \(bee/1.heic\)"):
        ImageFolder(tmp_path, 8)
    with pytest.warns(ImageFolderWarning, match="bee, a class folder without an image"):
        assert ImageFolder(tmp_path, 8, empty_classes="leave out").class_names == ("ant", "cow")
    save(tmp_path / "bee" / "1.bmp")
    with pytest.warns(ImageFolderWarning, match="1 .heic"):
        assert ImageFolder(tmp_path, 8).class_names == ("ant", "bee", "cow")
    save(tmp_path / "loose.png")
    (tmp_path / "dog").mkdir()
    with pytest.warns(ImageFolderWarning, match="so there are no labels"):
        assert ImageFolder(tmp_path, 8).class_names == ()


def test_chosen_endings_and_excluded_folders(tmp_path: Path) -> None:
    for name in ("ant/1.png", "ant/2.bmp", "old/3.png"):
        save(tmp_path / name)
    with pytest.warns(ImageFolderWarning, match=r"1 .bmp \(ant/2.bmp\), .*; old, excluded"):
        data = ImageFolder(tmp_path, 8, suffixes=[".PNG"], exclude=[tmp_path / "old", tmp_path / "absent"])
    assert list(data.files) == ["ant/1.png"]
    assert data.suffixes == (".png",)


def test_another_type_under_the_name_of_a_chosen_one(tmp_path: Path) -> None:
    """Endings choose the types: a folder that was read as png alone holds the same images under later versions."""
    save(tmp_path / "a.png", format="GIF")
    with pytest.raises(CorruptFileError, match="a.png: not an image of a type that is read"):
        ImageFolder(tmp_path, 8, suffixes=[".png"])
    assert len(ImageFolder(tmp_path, 8)) == 1


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", pixels=np.zeros((8, 8), np.float32))
    with pytest.raises(CorruptFileError, match="a.tif: pixels of mode F, whose range is not known"):
        ImageFolder(tmp_path, 8)
    save(tmp_path / "a.tif", pixels=np.zeros((8, 8), np.int32))
    with pytest.raises(CorruptFileError, match="a.tif: pixels of mode I, whose range is not known"):
        ImageFolder(tmp_path, 8)
    save(tmp_path / "a.tif", pixels=np.full((8, 8), 257 * 9, np.uint16))
    assert (values(tmp_path) == 9).all()


# ---- Metadata


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    whole = buffer.getvalue()
    return whole[:33] + b"".join(chunks) + whole[33:]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes().removeprefix(b"Exif\0\0")


def texts() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def webp(**options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "WEBP", lossless=True, **options)
    return buffer.getvalue()


DAMAGED = {
    "exif-not-tiff.png": png_with(chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03")),
    "exif-empty.png": png_with(chunk(b"eXIf", b"")),
    "exif-checksum.png": png_with(chunk(b"eXIf", exif(3))[:-4] + b"\0\0\0\0"),
    "text-large.png": texts(),
    "text-checksum.png": png_with(chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0"),
    "text-not-zlib.png": png_with(chunk(b"zTXt", b"a\0\0not compressed")),
    "profile-large.png": png_with(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000)))),
    "profile-not-zlib.png": png_with(chunk(b"iCCP", b"p\0\0none")),
    "exif-not-tiff.webp": webp(exif=b"Exif\0\0neither II nor MM"),
    "profile-no-profile.webp": webp(icc_profile=b"none"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("check", ["decode", "header"])
def test_metadata_do_not_decide_over_pixels(name: str, check: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    image = ImageFolder(tmp_path, 8, check=check).image(0)
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1).float().div(127.5).sub(1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "segment", [b"Exif\0\0neither II nor MM", b"Exif\0\0II*\0\x08\0\0\0\x05\0"], ids=["tiff", "end"]
)
def test_damaged_exif_of_a_jpeg(segment: bytes, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole" / "a.jpg", quality=95).read_bytes()
    (tmp_path / "damaged").mkdir()
    marked = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]
    (tmp_path / "damaged" / "a.jpg").write_bytes(marked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        assert (values(tmp_path / "damaged") == values(tmp_path / "whole")).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("more", [b"", chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000)))], ids=["", "profile"])
def test_orientations(orientation: int, more: bytes, tmp_path: Path) -> None:
    """Also where other metadata make Pillow give up at first."""
    (tmp_path / "a.png").write_bytes(png_with(more, chunk(b"eXIf", exif(orientation))))
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }
    assert (values(tmp_path) == turned[orientation]).all()


def test_orientation_of_a_tiff(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    assert (values(tmp_path) == np.rot90(PIXELS, -1)).all()


def test_damaged_pixels_stay_an_error(tmp_path: Path) -> None:
    whole = png_with(chunk(b"zTXt", b"a\0\0not compressed"))
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"a.png: "):
        ImageFolder(tmp_path, 8)
    (tmp_path / "a.png").write_bytes(texts())
    with pytest.raises(CorruptFileError, match="8 x 8 = 64 pixels, more than the limit 63"):
        ImageFolder(tmp_path, 8, max_pixels=63)


@pytest.mark.parametrize(
    ("depth", "row", "value", "grey"),
    [
        (1, b"\0", 0, 0),
        (2, b"\x55" * 2, 1, 85),
        (4, b"\x33" * 4, 3, 51),
        (8, b"\x33" * 8, 51, 51),
        (16, b"\x33\x33" * 8, 0x3333, 51),
        (16, b"\x33\x34" * 8, 0x3334, 51),
    ],
    ids=["1", "2", "4", "8", "16", "16-low-byte"],
)
def test_transparent_value_of_grey_images(depth: int, row: bytes, value: int, grey: int, tmp_path: Path) -> None:
    """The value has the depth of the file."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b"")
    for is_white, named in ((True, value), (False, value ^ 1)):
        trns = chunk(b"tRNS", struct.pack(">H", named))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + trns + pixels)
        assert (values(tmp_path) == (255 if is_white else grey)).all()


def test_transparent_value_of_16_bit_colours(tmp_path: Path) -> None:
    """Pillow keeps the high bytes alone."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\1\x10\2\x20\3\x30" * 8) * 8)) + chunk(b"IEND", b"")
    for named, expected in ((b"\1\x10\2\x20\3\x30", (255, 255, 255)), (b"\x10\1\x20\2\x30\3", (1, 2, 3))):
        whole = b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", named) + pixels
        (tmp_path / "a.png").write_bytes(whole)
        assert (values(tmp_path) == expected).all()
