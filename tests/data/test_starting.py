"""A folder of images started with again: what is known of its files, decoded images in a file, reduced decoding."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file

from fastvq._lock import locked
from fastvq.data import ImageFolder, images, load_images, pictures
from fastvq.data.images import ImageFolderWarning
from fastvq.errors import CorruptFileError, DiskFullError, FileConflictError


def pixels(width: int = 12, height: int = 12, seed: int = 0) -> np.ndarray:
    """Smooth ones, as those of photographs are: uint8 [H, W, 3]."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, *, mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (12, 12), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(*size, seed)).convert(mode).save(path, **options)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_all_kinds(folder: Path) -> None:
    """Pictures of every common kind, of 96 x 80 pixels."""
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("plain.jpg", "RGB", {"quality": 95}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("cmyk.jpg", "CMYK", {}),
        ("grey.jpg", "L", {}),
        *((f"turned{way}.jpg", "RGB", {"exif": turned(way)}) for way in range(2, 9)),
        ("colour.png", "RGB", {}),
        ("palette.png", "P", {}),
        ("alpha.png", "RGBA", {}),
        ("deep.png", "I;16", {}),
        ("a.gif", "P", {}),
        ("a.webp", "RGB", {}),
        ("lossless.webp", "RGBA", {"lossless": True}),
        ("a.tiff", "RGB", {"compression": "tiff_lzw"}),
        ("a.bmp", "RGB", {}),
    ]
    for seed, (name, mode, options) in enumerate(kinds):
        if mode == "I;16":
            Image.fromarray(pixels(96, 80, seed)[..., 0].astype(np.uint16) * 257).save(folder / name)
        else:
            save(folder / name, mode=mode, seed=seed, size=(96, 80), **options)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that are opened, in the order of their names."""
    seen: list[str] = []

    def noting(function: Any) -> Any:
        def note(path: Path, *rest: Any, **more: Any) -> Any:
            seen.append(path.name)
            return function(path, *rest, **more)

        return note

    for name in ("check_picture", "read_picture"):
        monkeypatch.setattr(images, name, noting(getattr(pictures, name)))
    return seen


def opened(looked: list[str]) -> list[str]:
    found = sorted(looked)
    looked.clear()
    return found


# ---- What is known of files


def test_the_second_start_opens_what_is_new_or_changed(tmp_path: Path, looked: list[str]) -> None:
    folder, known = tmp_path / "photos", tmp_path / "run" / "files"
    for index in range(4):
        save(folder / "a" / f"{index}.png", seed=index)
    first = ImageFolder(folder, 8, check="header", known=known)
    assert opened(looked) == ["0.png", "1.png", "2.png", "3.png"]
    assert not known.exists()
    first.remember()
    again = ImageFolder(folder, 8, check="header", known=known)
    assert opened(looked) == []
    assert again.fingerprint() == first.fingerprint()
    assert again.files == first.files
    assert again.paths == first.paths

    os.utime(folder / "a" / "1.png", ns=(0, 1))
    save(folder / "a" / "2.png", seed=9, size=(13, 13))
    (folder / "a" / "3.png").rename(folder / "a" / "4.png")
    changed = ImageFolder(folder, 8, check="header", known=known)
    assert opened(looked) == ["1.png", "2.png", "4.png"]
    changed.remember()
    ImageFolder(folder, 8, check="header", known=known)
    assert opened(looked) == []
    # Another place of the same files.
    folder.rename(tmp_path / "moved")
    ImageFolder(tmp_path / "moved", 8, check="header", known=known)
    assert opened(looked) == []


def test_headers_alone_are_no_whole_check(tmp_path: Path, looked: list[str]) -> None:
    save(tmp_path / "photos" / "1.png")
    known = tmp_path / "files"
    ImageFolder(tmp_path / "photos", 8, check="header", known=known).remember()
    opened(looked)
    ImageFolder(tmp_path / "photos", 8, known=known).remember()
    assert opened(looked) == ["1.png"]
    for check in ("decode", "header"):
        ImageFolder(tmp_path / "photos", 8, check=check, known=known)  # type: ignore[arg-type]
        assert opened(looked) == []


def test_broken_files_are_looked_at_again_and_frames_are_known(tmp_path: Path, looked: list[str]) -> None:
    folder, known = tmp_path / "photos", tmp_path / "files"
    save(folder / "1.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    frames[0].save(folder / "2.gif", save_all=True, append_images=frames[1:])
    (folder / "3.png").write_text("no picture")
    for expected in (["1.png", "2.gif", "3.png"], ["3.png"]):
        opened(looked)
        with pytest.warns(ImageFolderWarning) as caught:
            data = ImageFolder(folder, 8, skip_broken=True, known=known)
        assert [str(one.message).split(" ")[0] for one in caught] == ["1", "1"]
        assert "1 files hold several frames, of which the first is read: 2.gif" in str(caught[1].message)
        assert opened(looked) == expected
        assert list(data.files) == ["1.png", "2.gif"]
        data.remember()


def no_safetensors(known: Path) -> None:
    known.write_text("words")


def cut_off(known: Path) -> None:
    known.write_bytes(known.read_bytes()[:-9])


def changed_flag(known: Path) -> None:
    with known.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 0xFF]))


def without_checksum(known: Path) -> None:
    save_file(load_file(known), known)


def a_folder(known: Path) -> None:
    known.unlink()
    known.mkdir()


@pytest.mark.parametrize("damage", [no_safetensors, cut_off, changed_flag, without_checksum, a_folder])
def test_a_damaged_file_of_what_is_known_says_nothing(damage: Any, tmp_path: Path, looked: list[str]) -> None:
    save(tmp_path / "photos" / "1.png")
    known = tmp_path / "files"
    ImageFolder(tmp_path / "photos", 8, check="header", known=known).remember()
    damage(known)
    opened(looked)
    ImageFolder(tmp_path / "photos", 8, check="header", known=known).remember()
    assert opened(looked) == ["1.png"]
    ImageFolder(tmp_path / "photos", 8, check="header", known=known)
    assert opened(looked) == (["1.png"] if known.is_dir() else [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "photos"]


@pytest.mark.parametrize("options", [{"max_pixels": 200}, {"suffixes": [".png"]}], ids=["limit", "types"])
def test_other_rules_are_another_check(options: dict[str, Any], tmp_path: Path, looked: list[str]) -> None:
    save(tmp_path / "photos" / "1.png")
    known = tmp_path / "files"
    ImageFolder(tmp_path / "photos", 8, check="header", known=known).remember()
    opened(looked)
    ImageFolder(tmp_path / "photos", 8, check="header", known=known, **options)
    assert opened(looked) == ["1.png"]


def test_names_that_are_no_text(tmp_path: Path, looked: list[str]) -> None:
    save(tmp_path / "photos" / "a\nb.png")
    save(tmp_path / "photos" / os.fsdecode(b"\xff\xfe.png"))
    known = tmp_path / "files"
    first = ImageFolder(tmp_path / "photos", 8, check="header", known=known)
    first.remember()
    opened(looked)
    assert ImageFolder(tmp_path / "photos", 8, check="header", known=known).files == first.files
    assert opened(looked) == []


# ---- What headers tell


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp"])
def test_a_cut_off_file_is_found_by_its_end(name: str, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole" / name, size=(64, 64)).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / name).write_bytes(whole[: len(whole) * 2 // 3])
    assert len(ImageFolder(tmp_path / "whole", 8, check="header")) == 1
    with pytest.raises(CorruptFileError, match=f"1 of 1 images cannot be read(?s:.*){name}: "):
        ImageFolder(tmp_path / "cut", 8, check="header")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp"])
def test_what_follows_a_picture_in_its_file_is_no_damage(name: str, tmp_path: Path) -> None:
    """As some cameras write it."""
    path = save(tmp_path / name, size=(64, 64))
    path.write_bytes(path.read_bytes() + b"more")
    assert len(ImageFolder(tmp_path, 8, check="header")) == len(ImageFolder(tmp_path, 8)) == 1


# ---- Decoded images in a file


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("draft", [False, True], ids=["whole", "draft"])
def test_stored_images_are_those_of_the_files(draft: bool, channels: int, tmp_path: Path, looked: list[str]) -> None:
    (tmp_path / "photos").mkdir()
    make_all_kinds(tmp_path / "photos")
    plain, stored = (ImageFolder(tmp_path / "photos", (16, 12), channels=channels, draft=draft) for _ in range(2))
    expected = load_images(plain, range(len(plain)))
    assert not stored.use_pixels(tmp_path / "cache")
    stored.keep_pixels(tmp_path / "cache")
    opened(looked)
    assert torch.equal(load_images(stored, range(len(stored))), expected)
    assert opened(looked) == []
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry == stored.pixels_folder(tmp_path / "cache")
    size = (entry / "pixels.npy").stat().st_size
    assert 0 < size - stored.pixels_bytes < 200
    assert stored.pixels_bytes == len(plain) * 16 * 12 * channels
    # In another process, to which the path goes and not the images.
    sent = pickle.dumps(stored)
    assert len(sent) < 20_000
    assert torch.equal(pickle.loads(sent).image(3), expected[3])
    # A later start compares some and reads no more.
    later = ImageFolder(tmp_path / "photos", (16, 12), channels=channels, draft=draft, check="header")
    opened(looked)
    later.keep_pixels(tmp_path / "cache")
    assert len(opened(looked)) == 16
    assert torch.equal(load_images(later, range(len(later))), expected)


def folder_of(tmp_path: Path, count: int = 3) -> ImageFolder:
    for index in range(count):
        save(tmp_path / "photos" / f"{index}.bmp", seed=index)
    return ImageFolder(tmp_path / "photos", 8)


def test_stored_images_of_files_that_have_changed_are_not_taken(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = folder_of(tmp_path)
    data.keep_pixels(cache)
    path = tmp_path / "photos" / "1.bmp"
    status = path.stat()
    save(path, seed=9)
    assert path.stat().st_size == status.st_size
    changed = ImageFolder(tmp_path / "photos", 8)
    assert changed.fingerprint() == data.fingerprint()
    assert not changed.use_pixels(cache)
    # Nor where the time is that of before, as of files that were unpacked.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    unpacked = ImageFolder(tmp_path / "photos", 8)
    assert unpacked.pixels_folder(cache) == data.pixels_folder(cache)
    assert not unpacked.use_pixels(cache)
    for options in ({"size": 4}, {"channels": 1}, {"draft": True}):
        other = ImageFolder(tmp_path / "photos", **{"size": 8, **options})  # type: ignore[arg-type]
        assert not other.use_pixels(cache)


def test_an_interrupted_store_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvq.data.pixels._ROWS", 1)
    monkeypatch.setattr("fastvq.data.pixels._SECONDS", 0)
    data, cache = folder_of(tmp_path, 6), tmp_path / "cache"
    expected = load_images(data, range(6))
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.keep_pixels(cache, every=stop)
    assert not data.use_pixels(cache)
    read = []
    whole = data._fresh
    monkeypatch.setattr(data, "_fresh", lambda index: read.append(index) or whole(index))
    data.keep_pixels(cache)
    assert read == [4, 5]
    assert torch.equal(load_images(data, range(6)), expected)


@pytest.mark.parametrize("damage", ["array", "progress", "entry"])
def test_damaged_stores_are_written_anew(damage: str, tmp_path: Path) -> None:
    data, cache = folder_of(tmp_path), tmp_path / "cache"
    expected = load_images(data, range(3))
    data.keep_pixels(cache)
    array, progress = (data.pixels_folder(cache) / name for name in ("pixels.npy", "pixels.json"))
    if damage == "array":
        array.write_bytes(array.read_bytes()[:-7])
    elif damage == "progress":
        progress.write_text("{")
    else:
        progress.write_text(progress.read_text().replace('"rows_done": 3', '"rows_done": 2'))
    again = ImageFolder(tmp_path / "photos", 8)
    assert not again.use_pixels(cache)
    again.keep_pixels(cache)
    assert again.use_pixels(cache)
    assert torch.equal(load_images(again, range(3)), expected)


def test_a_damaged_image_and_a_full_disk_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = folder_of(tmp_path), tmp_path / "cache"
    (tmp_path / "photos" / "1.bmp").write_bytes(b"BM")
    with pytest.raises(CorruptFileError, match=r"1\.bmp: "):
        data.keep_pixels(cache)

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "photos" / "1.bmp").unlink()
    other = ImageFolder(tmp_path / "photos", 4)
    monkeypatch.setattr("fastvq._files._allocate", no_room)
    with pytest.raises(DiskFullError, match=rf"pixels\.npy: .*{128 + 2 * 4 * 4 * 3} bytes are needed"):
        other.keep_pixels(cache)


def test_two_at_one_store(tmp_path: Path) -> None:
    data, cache = folder_of(tmp_path), tmp_path / "cache"
    place = data.pixels_folder(cache)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(place):
            held.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(FileConflictError, match="is in use by"):
            data.keep_pixels(cache)
    finally:
        free.set()
        thread.join()


# ---- Reduced decoding


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(12, 12), (8, 16), (20, 5)], ids=str)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7, 8])
@pytest.mark.parametrize("whole", [(203, 150), (97, 231)], ids=str)
def test_reduced_decoding_shows_the_same(
    whole: tuple[int, int], orientation: int, size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    save(tmp_path / "1.jpg", size=whole, quality=95, exif=turned(orientation))
    full, draft = (ImageFolder(tmp_path, size, channels=channels, draft=draft).image(0) for draft in (False, True))
    difference = (full - draft).abs() * 127.5
    assert difference.max() > 0
    assert difference.mean() < 0.5
    assert difference.max() < 2.5


@pytest.mark.parametrize("whole", [(47, 200), (200, 47)], ids=str)
def test_what_is_not_four_times_as_large_is_decoded_in_full(whole: tuple[int, int], tmp_path: Path) -> None:
    save(tmp_path / "1.jpg", size=whole)
    full, draft = (ImageFolder(tmp_path, 12, draft=draft).image(0) for draft in (False, True))
    assert torch.equal(full, draft)


def test_nothing_but_jpeg_is_reduced_and_the_limit_is_of_the_file(tmp_path: Path) -> None:
    save(tmp_path / "png" / "1.png", size=(200, 200))
    full, draft = (ImageFolder(tmp_path / "png", 8, draft=draft) for draft in (False, True))
    assert torch.equal(full.image(0), draft.image(0))
    assert full.fingerprint() != draft.fingerprint()
    save(tmp_path / "jpg" / "1.jpg", size=(200, 200))
    with pytest.raises(CorruptFileError, match="200 x 200 = 40000 pixels, more than the limit 39999"):
        ImageFolder(tmp_path / "jpg", 8, draft=True, max_pixels=39999)


def test_jpegs_of_several_pictures_are_reduced_too(tmp_path: Path) -> None:
    """As many telephones write them."""
    frames = [Image.fromarray(pixels(200, 200, seed)) for seed in range(2)]
    frames[0].save(tmp_path / "1.jpg", "MPO", save_all=True, append_images=frames[1:])
    full, draft = (ImageFolder(tmp_path, 8, check="header", draft=draft).image(0) for draft in (False, True))
    assert 0 < (full - draft).abs().max() * 127.5 < 2.5
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 4])
    with pytest.raises(CorruptFileError, match=r"1\.jpg: "):
        ImageFolder(tmp_path, 8, check="header")


def test_the_part_of_a_picture_is_that_of_pillow() -> None:
    image = Image.fromarray(pixels(37, 23))
    for width, height in ((8, 8), (12, 5), (3, 11)):
        box = pictures._centre(image.size, (width, height))
        ours = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        assert ours == ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
