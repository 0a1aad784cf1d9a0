"""What ``fastvq info`` says of presets: a list that fits a terminal, and all of one of them."""

from __future__ import annotations

import re

import pytest
from toys.model import Bigram

from fastvq.cli import describe, installation, main
from fastvq.models import PRESETS
from fastvq.training.recipes import Measured


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    return {line.split()[0]: line for line in out.splitlines() if line.split()[:1]}


def test_every_preset_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys)
    assert PRESETS.keys() <= found.keys()
    assert re.search(r"0\.56 M +32x32 +2x2 4x4 +23\.7 MB @ 64$", found["digits"])
    assert re.search(r"0\.90 M +32x32 +4x4 +8\.\d+ MB +54\.4 MB @ 128$", found["digits-bottom"])
    assert re.search(r" 1\.7 B +256x256 +32x32 +18\.\d GB +> 33\.3 GB$", found["imagenet256-top"])
    assert re.search(r" 3\.40 M +1024x1024 +32x32 64x64 128x128 +> 68 MB$", found["ffhq1024"])
    names = list(found)
    # Nobody takes the largest for the first choice.
    assert names.index("photos64-bottom") < names.index("photos256-top") < names.index("imagenet256-top")


def test_a_build_for_many_architectures_fits_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    architectures = " ".join(f"{number}-real" for number in (80, 86, 89, 90, 100, 103, 110, 120))
    error = "CUDA driver version is insufficient for CUDA runtime version"
    monkeypatch.setattr(installation, "cuda_summary", lambda: f"13.0 for {architectures} 120-virtual; {error}")
    assert rows(capsys)["cuda"].startswith("cuda        13.0 for 80-real 86-real")


def test_a_prior_of_ones_own_without_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy-bigram" in Bigram.presets
    assert re.search(r"toy-bigram +0\.\d\d M +\S+ +naive +> ", rows(capsys)["toy-bigram"])
    assert main(["info", "--preset", "toy-bigram"]) == 0
    assert "sampling: only the naive engine runs it" in capsys.readouterr().out


def test_times_are_shown_where_they_were_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (
        Measured(device="H100", seconds=35.2, source="bench/results/a.json"),
        Measured(device="2 CPU cores", seconds=9000, source="bench/results/b.json"),
    )
    monkeypatch.setattr(describe, "MEASURED", {"photos256-bottom": times})
    assert rows(capsys)["photos256-bottom"].endswith("  35.2 s H100")
    assert main(["info", "--preset", "photos256-bottom"]) == 0
    out = capsys.readouterr().out
    assert "measured    35.2 s per 1000 steps on H100 (bench/results/a.json)" in out
    assert "measured    9000 s per 1000 steps on 2 CPU cores (bench/results/b.json)" in out


def test_a_preset_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "digits-bottom"]) == 0
    out = capsys.readouterr().out
    assert "for         level 1 of digits, images of 32 x 32" in out
    assert "recipe      --batch-size 128 --lr 0.001 --steps 4000" in out
    assert "training    54.4 MB of memory with that batch" in out
    assert re.search(r"in all +8\.\d+ MB, the prior itself included", out)
    assert main(["info", "--preset", "digits-bottom", "--set", "channels=128"]) == 0
    changed = re.search(r"training +([\d.]+) MB of memory", capsys.readouterr().out)
    assert changed is not None
    assert float(changed[1]) > 60
    assert main(["info", "--preset", "digits"]) == 0
    assert "codes of 32 x 32 images: 2 x 2, 4 x 4 (top first)" in capsys.readouterr().out


def test_training_takes_batch_and_size_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "digits", "--train"]) == 0
    out = capsys.readouterr().out
    assert "training with batches of 64:" in out
    assert re.search(r"peak +23\.6\d MB", out)
