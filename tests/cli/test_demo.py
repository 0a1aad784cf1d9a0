"""What the demo shows beside the digits: the speed of sampling, and pictures of the colour model that ships."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvq import sample
from fastvq.cli import demo, speed
from fastvq.cli.speed import Comparison, compare_engines, naive_seconds
from fastvq.data.grid import grid_size
from fastvq.models import VQVAE2, PixelSNAIL
from fastvq.sampling import Pipeline

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture(scope="module")
def digits() -> Pipeline:
    return Pipeline.from_pretrained("digits")


@pytest.fixture
def colour(tmp_path: Path) -> Path:
    """A folder with a pipeline of colour images in three classes, whose codes are 2 x 2 and 4 x 4."""
    torch.manual_seed(0)
    vqvae = VQVAE2.from_preset("tiny", in_channels=3).eval()
    fields: dict[str, Any] = {"num_classes": 3}
    top = PixelSNAIL.from_preset("tiny-top", **fields).eval()
    bottom = PixelSNAIL.from_preset("tiny-bottom", **fields).eval()
    names = ("faces", "flags", "food")
    return Pipeline(vqvae, [top, bottom], class_names=names).save_pretrained(tmp_path / "colour")


def asked(out: Path) -> argparse.Namespace:
    out.mkdir()
    return argparse.Namespace(out=out, quiet=True, effort=0.001, seed=3, label=None)


def test_both_engines_draw_the_same(digits: Pipeline) -> None:
    found = compare_engines(digits, 0.01, seed=0, progress=False)
    assert found.shape[1:] == (4, 4)
    assert found.shape[0] >= 1
    assert found.engine == "cpu"
    assert found.differing == 0
    assert min(found.naive, found.default) > 0


def test_more_grids_are_drawn_until_time_is_up(digits: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second a grid by the clock, which stands still otherwise."""
    drawn: list[tuple[int, str]] = []
    clock = [0.0]

    def timed_sample(prior: Any, n: int, *, engine: str = "auto", progress: bool = False, **rest: Any) -> Tensor:
        drawn.append((n, engine))
        clock[0] += n / 2 if engine == "naive" else n / 1000
        return torch.zeros(n, *prior.config.shape, dtype=torch.int64)

    monkeypatch.setattr(speed, "sample", timed_sample)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    found = compare_engines(digits, 10, seed=0, progress=False)
    assert [n for n, engine in drawn if engine == "naive"] == [1, 20]
    assert (found.shape, found.naive) == ((20, 4, 4), 10)
    assert found.default == pytest.approx(0.02)


def test_codes_that_differ_are_counted(digits: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(prior: Any, n: int, *, engine: str = "auto", progress: bool = False, **rest: Any) -> Tensor:
        codes = sample(prior, n, **rest)
        if engine == "naive":
            codes.flatten()[:2] += 1
        return codes

    monkeypatch.setattr(speed, "sample", wrong)
    assert compare_engines(digits, 0, seed=0, progress=False).differing == 2


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            Comparison((3, 16, 16), "cpu", 10.25, 0.05, 0),
            "3 grids of 16 x 16 codes: naive 10.2 s, cpu 0.05 s, 205 times as fast; 0 of 768 codes differ",
        ),
        (
            Comparison((1, 4, 4), "naive", 0.5, 0.4, 7),
            "1 grid of 4 x 4 codes: naive 0.5 s, naive 0.4 s, 1.2 times as fast; 7 of 16 codes differ",
        ),
    ],
)
def test_a_comparison_in_words(found: Comparison, text: str) -> None:
    assert str(found) == text


def test_naive_sampling_is_counted_in_passes(digits: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 5, 10, 12, 20, 24])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    # Sixteen positions, on average in a grid of two and a half of four rows.
    assert naive_seconds(digits) == 2 * 16 * 2.5 / 4


def test_colour_samples_where_such_a_model_ships(
    digits: Pipeline, colour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "shipped", lambda: {"emoji": colour})
    monkeypatch.setattr(demo, "naive_seconds", lambda pipeline: 0.0)
    arguments = asked(tmp_path / "out")
    demo._show_more(digits, arguments, "cpu")
    out = capsys.readouterr().out
    assert "sampling the finest prior of emoji" in out
    assert re.search(r"grids? of 4 x 4 codes: naive", out)
    assert f"{arguments.out / 'emoji.png'}: from the model that ships as --pretrained emoji" in out
    picture = Image.open(arguments.out / "emoji.png")
    height, width, _ = grid_size(24, 16, 16, 3, captions=("faces", "flags", "food"))
    assert picture.mode == "RGB"
    assert picture.size == (width, height)


def test_a_model_too_slow_for_the_naive_engine_is_left_to_pictures(
    digits: Pipeline, colour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "shipped", lambda: {"emoji": colour})
    monkeypatch.setattr(demo, "naive_seconds", lambda pipeline: 1e9)
    arguments = asked(tmp_path / "out")
    demo._show_more(digits, arguments, "cpu")
    assert "sampling the finest prior of digits" in capsys.readouterr().out
    assert (arguments.out / "emoji.png").is_file()


def test_without_a_colour_model_there_is_no_such_picture(
    digits: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "shipped", dict)
    arguments = asked(tmp_path / "out")
    demo._show_more(digits, arguments, "cpu")
    assert "sampling the finest prior of digits" in capsys.readouterr().out
    assert list(arguments.out.iterdir()) == []
