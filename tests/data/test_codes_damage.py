"""Codes on disk that were damaged or changed: what opening them finds, and what training finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import VQVAE_CONFIG, Noise, make_codes, stage2

from fastvq._files import sealed
from fastvq.data import CodeDataset, extract_codes
from fastvq.errors import CorruptFileError
from fastvq.models import VQVAE2

pytestmark = pytest.mark.usefixtures("steady")


def extract(folder: Path) -> Path:
    torch.manual_seed(0)
    return extract_codes(VQVAE2(VQVAE_CONFIG).eval(), Noise(), None, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return extract(tmp_path / "codes")


def reworked(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change entries of the description, and its checksum with them."""
    path = folder / "codes.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(sealed(description)))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["train", "validation"])
def test_changed_codes_are_found_before_training(name: str, tmp_path: Path) -> None:
    make_codes(tmp_path)
    folder = tmp_path / name
    CodeDataset(folder).verify()
    flip(folder / "level1.npy", -3)
    codes = CodeDataset(folder)
    with pytest.raises(CorruptFileError, match=r"level1.npy: checksum differs from the one in codes.json; extract"):
        codes.verify()
    with pytest.raises(CorruptFileError, match=rf"{name}/level1.npy: checksum differs"):
        stage2(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    reworked(folder, lambda description: description.pop("sha256"))
    CodeDataset(folder).verify()


@pytest.mark.parametrize("name", ["source.npy", "labels.npy"])
def test_changed_rows_are_found_at_once(name: str, folder: Path) -> None:
    array = np.load(folder / name)
    array[0] = array[np.flatnonzero(array != array[0])[0]]
    np.save(folder / name, array)
    with pytest.raises(CorruptFileError, match=rf"{name}: checksum differs from the one in codes.json"):
        CodeDataset(folder)


def test_a_changed_description_is_found(folder: Path) -> None:
    path = folder / "codes.json"
    text = path.read_text()
    path.write_text(text.replace('"num_classes": 3', '"num_classes": 4'))
    assert path.read_text() != text
    with pytest.raises(CorruptFileError, match=r"codes.json: its entries do not fit the checksum among them"):
        CodeDataset(folder)


WRONG_ENTRIES: dict[str, tuple[str, Any, str]] = {
    "shapes-one-side": ("shapes", [[2], [4, 4]], "shapes is .*, expected a list of 1 of a list of 2 of an integer"),
    "shapes-text": ("shapes", [["x", 2], [4, 4]], "shapes is"),
    "shapes-negative": ("shapes", [[-2, 2], [4, 4]], "shapes is"),
    "num_codes-none": ("num_codes", [], r"num_codes is \[\], expected a list of 1 of an integer in 1..2147483648"),
    "num_codes-fewer": ("num_codes", [8], "2 shapes, but num_codes is"),
    "rows-infinite": ("rows", float("inf"), "rows is Infinity, expected an integer in 1"),
    "rows-flag": ("rows", True, "rows is true, expected an integer in 1"),
    "classes-text": ("num_classes", "x", 'num_classes is "x", expected an integer in 1..2147483648 or null'),
    "classes-huge": ("num_classes", 2**70, "num_classes is"),
    "names-number": ("class_names", 3, "class_names is 3, expected a list of text"),
    "arguments-list": ("arguments", [], r"arguments is \[\], expected an object"),
    "arguments-empty": ("arguments", {}, "no model, expected text"),
    "complete-text": ("complete", "yes", 'complete is "yes", expected true or false'),
    "checksums-list": ("sha256", ["a"], "sha256 is"),
}


@pytest.mark.parametrize(("name", "value", "message"), WRONG_ENTRIES.values(), ids=WRONG_ENTRIES.keys())
def test_wrong_entries_are_named(name: str, value: Any, message: str, folder: Path) -> None:
    reworked(folder, lambda description: description.update({name: value}))
    for opened in (CodeDataset, extract):
        with pytest.raises(CorruptFileError, match=rf"codes.json: missing or wrong entry: {message}"):
            opened(folder)


def header_without_end(data: bytes) -> bytes:
    return data.replace(b"}", b" ", 1)


def column_major(data: bytes) -> bytes:
    return data.replace(b"'fortran_order': False", b"'fortran_order': True ", 1)


@pytest.mark.parametrize("damage", [header_without_end, column_major])
def test_headers_of_arrays_are_checked(damage: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "level0.npy"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(CorruptFileError, match=r"level0.npy: not a complete array file"):
        CodeDataset(folder)


JSON: dict[str, bytes] = {
    "nested": b"[" * 100_000,
    "nested-objects": b'{"a":' * 100_000,
    "huge-integer": b'{"rows": ' + b"9" * 10_000 + b"}",
    "not-utf-8": b'{"a": "\xff"}',
    "nothing": b"",
    "a-list": b"[]",
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON.keys())
def test_json_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "codes.json").write_bytes(content)
    for opened in (CodeDataset, extract):
        with pytest.raises(CorruptFileError, match=r"codes.json: (not valid JSON|expected a JSON object)"):
            opened(folder)
