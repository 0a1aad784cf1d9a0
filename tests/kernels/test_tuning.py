"""The table of measured tiles: what kernels get from it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import refuses

from fastvq.errors import CorruptFileError, MissingFileError
from fastvq.kernels import front_tiles, tuning
from fastvq.kernels.tuning import asking, planned, tuned


class Toy(NamedTuple):
    block: int
    warps: int


TOYS = (Toy(16, 4), Toy(32, 4), Toy(32, 8))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Another table in place of the package's."""

    def put(tiles: Any, **changes: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"format": tuning.FORMAT, "tiles": tiles, **changes}))
        monkeypatch.setattr(tuning, "TABLE", path)
        return path

    return put


def test_the_package_has_a_table_and_nothing_in_it_yet() -> None:
    stored = json.loads(tuning.TABLE.read_text())
    assert stored == {"format": 1, "tiles": {}, "measured": {}}
    assert tuned("toy", 90, "small", TOYS) is None


def test_tiles_of_a_capability_kernel_and_size(write: Write) -> None:
    write({"90": {"toy": {"small": {"block": 32, "warps": 8}}}, "80": {"toy": {"small": {"block": 16, "warps": 4}}}})
    assert tuned("toy", 90, "small", TOYS) is TOYS[2]
    assert tuned("toy", 80, "small", TOYS) is TOYS[0]
    for kernel, capability, sizes in (("toy", 100, "small"), ("toy", 90, "large"), ("other", 90, "small")):
        assert tuned(kernel, capability, sizes, TOYS) is None


def test_a_rule_decides_where_the_table_has_nothing(write: Write) -> None:
    rule = front_tiles.product_tiles("bfloat16", 1408, 90)
    assert rule == (256, 128, 64, 8, 4)
    other = next(tiles for tiles in front_tiles.PRODUCT_CANDIDATES["bfloat16", 1024] if tiles != rule)
    write({"90": {"front_product": {"bfloat16 positions 1024": other._asdict()}}})
    assert front_tiles.product_tiles("bfloat16", 1408, 90) == other
    assert front_tiles.product_tiles("float32", 22, 90) == (32, 64, 32, 4, 4)
    assert front_tiles.product_tiles("bfloat16", 1408, 80) == (256, 128, 64, 8, 3)


def test_rules_are_among_the_candidates() -> None:
    for capability in (80, 90, 100):
        for (precision, most), candidates in front_tiles.PRODUCT_CANDIDATES.items():
            assert {tiles.block_k for tiles in candidates} == {front_tiles.product_depth(precision)}
            assert all(front_tiles.PACKED_COLUMNS % tiles.block_n == 0 for tiles in candidates)
            tiles = front_tiles.product_tiles(precision, most, capability)
            assert tiles == front_tiles.product_candidates(precision, most, capability)[0]


def test_one_constant_makes_tiles_of_products_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_tiles, "BY_POSITIONS", False)
    for precision in front_tiles.PLANES:
        assert len({front_tiles.product_tiles(precision, positions, 90) for positions in (1, 22, 352, 1408)}) == 1


def test_other_rules_are_among_the_candidates() -> None:
    for capability in (80, 90, 100):
        assert front_tiles.tail_tiles(capability) in front_tiles.TAIL_CANDIDATES
        for num_codes in (2, 128, 512, 8192):
            assert front_tiles.draw_tiles(num_codes, capability) in front_tiles.DRAW_CANDIDATES


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ({"90": {"toy": {"small": {"block": 64, "warps": 8}}}}, "tiles/90/toy/small: {.*64.* is none of its candid"),
        ({"90": {"toy": {"small": {"block": 32}}}}, "tiles/90/toy/small: {'block': 32} is none of its candidates"),
        ({"90": {"toy": {"small": [32, 8]}}}, r"tiles/90/toy/small: expected an object, got \[32, 8\]"),
        ({"90": {"toy": 3}}, "tiles/90/toy: expected an object, got 3"),
        ({"90": None}, "tiles/90: expected an object, got None"),
        ([], r"missing or wrong entry: tiles is \[\], expected an object"),
    ],
    ids=["no-candidate", "field-missing", "list", "kernel", "capability", "all"],
)  # fmt: skip
def test_a_wrong_entry_is_named_with_its_file(tiles: Any, message: str, write: Write) -> None:
    path = write(tiles)
    with refuses(CorruptFileError, f"{path}: {message}"):
        tuned("toy", 90, "small", TOYS)


def test_wrong_files(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write({}, format=7)
    with refuses(CorruptFileError, f"{path}: format is 7, expected 1"):
        tuned("toy", 90, "small", TOYS)
    path = write({})
    path.write_text("{")
    with refuses(CorruptFileError, f"{path}: not valid JSON"):
        tuned("toy", 90, "small", TOYS)
    monkeypatch.setattr(tuning, "TABLE", path.with_name("none.json"))
    with refuses(MissingFileError, f"{path.with_name('none.json')}: no such file"):
        tuned("toy", 90, "small", TOYS)


def test_what_is_asked_is_noted_and_one_kernel_gets_others(write: Write) -> None:
    write({"90": {"toy": {"small": TOYS[0]._asdict()}}})
    with asking() as asked:
        tuned("toy", 90, "small", TOYS)
        with asking(("toy", 90, "small"), TOYS[2]) as inner:
            assert tuned("toy", 90, "small", TOYS) == TOYS[2]
            assert tuned("toy", 90, "large", TOYS) is None
        assert [one.sizes for one in inner] == ["small", "large"]
        assert tuned("toy", 90, "small", TOYS) == TOYS[0]
    assert asked == [("toy", 90, "small", TOYS)] * 2
    tuned("toy", 90, "small", TOYS)
    assert len(asked) == 2


def test_tiles_are_known_without_triton() -> None:
    code = "import sys, fastvq.kernels.front_tiles; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_plans_follow_tiles_that_are_measured() -> None:
    @planned
    def plan(size: int) -> Toy:
        made.append(size)
        return tuned("toy", 90, "small", TOYS) or TOYS[0]

    made: list[int] = []
    assert plan(1) is plan(1) is TOYS[0]
    assert made == [1]
    with asking(("toy", 90, "small"), TOYS[1]) as asked:
        assert plan(1) is plan(1) is TOYS[1]
        assert len(asked) == 1
    assert plan(1) is TOYS[0]
