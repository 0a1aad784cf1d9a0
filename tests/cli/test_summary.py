"""What a run says before it begins, what it takes from recipes, and that a dry run ends there."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.cli import main, summary
from fastvq.cli.summary import Start, bytes_text, number_text, time_text
from fastvq.models import PRESETS
from fastvq.training import TrainConfig, training_memory
from fastvq.training.recipes import Measured

pytestmark = pytest.mark.usefixtures("steady")
DIGITS = ["train-vqvae", "--data", "digits", "--preset", "digits", "--validation", "0.5"]
TINY = ["--steps", "2", "--batch-size", "4", "--image-every", "2", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten 16 x 16 images in two classes, a damaged one, and a file that is none."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, count in (("cats", 7), ("dogs", 3)):
        (root / name).mkdir()
        for index in range(count):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(root / name / f"{index}.png")
    (root / "dogs" / "bad.png").write_text("words")
    (root / "notes.md").write_text("words")
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with an autoencoder of their preset, hardly trained, and their codes."""
    run = tmp_path_factory.mktemp("project") / "run"
    assert main([*DIGITS, "--run", str(run), "--steps", "1", "--batch-size", "2", "--quiet", "--workers", "0"]) == 0
    assert main(["extract", "--run", str(run), "--quiet"]) == 0
    return run


def lines(text: str) -> dict[str, str]:
    """By title."""
    return {found[1].strip(): found[2] for found in re.finditer(r"^(.{11}) (.*)$", text, re.MULTILINE)}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (None, "none"),
        ([0, 0, 0], "1, of 3"),
        ([0, 1, 1, 0], "2, of 2 each"),
        ([0, 1, 1, 1, 2, 2], "3, of 1 (a) to 3 (b)"),
        ([0, 0, 2], "3, of 0 (b) to 2 (a)"),
    ],
)
def test_classes_are_counted(labels: list[int] | None, text: str) -> None:
    names = ["a", "b", "c"][: 0 if labels is None else max(labels) + 1]
    assert summary._classes(None if labels is None else torch.tensor(labels), names) == text


def test_a_dry_run_says_all_and_writes_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = tmp_path / "run", contents(photos)
    command = ["train-vqvae", "--run", str(run), "--data", str(photos), "--size", "16", "--preset", "tiny", "--dry-run"]
    assert main([*command, "--set", "in_channels=3", "--skip-broken", *TINY]) == 0
    out = capsys.readouterr().out
    found = lines(out)
    assert found["images"] == "10, 16 x 16, colour; left out: 1 cannot be read, 1 no pictures"
    assert found["classes"] == "2, of 3 (dogs) to 7 (cats)"
    assert found["split"] == "9 to train on, 1 held out"
    model = PRESETS["tiny"][0].from_preset("tiny", in_channels=3)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert found["model"] == f"tiny, {count / 1e6:.3g} million parameters; codes 2 x 2, 4 x 4 (top first) of 16"
    assert found["training"] == "2 steps of 4, 0.889 epochs"
    assert found["device"].startswith("cpu (1 CPU core)")
    memory = training_memory(model.config, TrainConfig(steps=2, batch_size=4), image_size=(16, 16)).peak
    assert found["memory"].startswith(f"about {bytes_text(memory)} of ")
    assert "from recipe" not in found
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []
    assert contents(photos) == before


def test_quiet_runs_say_nothing_of_it(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-vqvae", "--run", str(tmp_path / "run"), "--data", str(photos), "--preset", "imagenet256"]
    assert main([*command, "--size", "16", "--skip-broken", "--dry-run", "--quiet", *TINY]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "warning" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_fills_in_what_is_not_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*DIGITS, "--run", str(run), "--dry-run"]) == 0
    found = lines(capsys.readouterr().out)
    assert found["from recipe"] == "--size 32 32 --batch-size 64 --lr 0.002 --steps 4000"
    assert found["training"].startswith("4000 steps of 64, ")
    assert main([*DIGITS, "--run", str(run), "--steps", "2", "--lr", "0.001", "--size", "16", "--workers", "0"]) == 0
    captured = capsys.readouterr()
    assert lines(captured.out)["from recipe"] == "--batch-size 64"
    assert "warning: digits is meant for images of 32 x 32, these are 16 x 16 (--size)" in captured.err
    train = json.loads((run / "vqvae" / "config.json").read_text())["train"]
    assert (train["batch_size"], train["learning_rate"], train["steps"]) == (64, 0.001, 2)
    # A run that goes on has its own record.
    assert main([*DIGITS, "--run", str(run), "--resume", "--steps", "3", "--dry-run"]) == 0
    found = lines(capsys.readouterr().out)
    assert "from recipe" not in found
    assert found["images"].startswith("1797, 16 x 16")
    assert found["training"].endswith("; 2 steps are done")
    assert json.loads((run / "vqvae" / "config.json").read_text())["train"] == train


def test_presets_without_a_schedule_leave_options_as_they_were(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-vqvae", "--run", str(tmp_path / "run"), "--data", str(photos), "--preset", "imagenet256"]
    assert main([*command, "--steps", "1"]) == 1
    assert "--size: images from a folder need a size" in capsys.readouterr().err
    assert main([*command, "--size", "256"]) == 1
    assert "--steps: a new run needs the number" in capsys.readouterr().err


@pytest.mark.parametrize(("level", "preset"), [(0, "digits-top"), (1, "digits-bottom")])
def test_a_prior_without_a_preset_takes_that_of_its_autoencoder(
    project: Path, level: int, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(project)
    assert main(["train-prior", "--run", str(project), "--level", str(level), "--steps", "5", "--dry-run"]) == 0
    found = lines(capsys.readouterr().out)
    assert found["from recipe"] == f"--preset {preset} --batch-size 128 --lr 0.001"
    assert found["codes"] == ("2 x 2 of 128" if level == 0 else "4 x 4 of 128, given 2 x 2")
    assert found["classes"].startswith("10, of ")
    assert found["split"] == "899 rows to train on, 898 held out"
    assert found["model"].startswith(f"{preset}, ")
    assert contents(project) == before


def test_the_preset_taken_is_recorded(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(project, run)
    command = ["train-prior", "--run", str(run), "--level", "0", "--workers", "0"]
    assert main([*command, *TINY, "--quiet"]) == 0
    record = json.loads((run / "prior0" / "config.json").read_text())
    assert record["notes"]["preset"] == "digits-top"
    assert main([*command, "--resume", "--dry-run"]) == 0
    assert lines(capsys.readouterr().out)["model"].startswith("digits-top, ")


def test_a_run_of_another_preset_needs_one_for_its_priors(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No default has billions of parameters."""
    run = tmp_path / "run"
    shutil.copytree(project, run)
    record = json.loads((run / "vqvae" / "config.json").read_text())
    record["notes"]["preset"] = "imagenet256"
    (run / "vqvae" / "config.json").write_text(json.dumps(record))
    assert main(["train-prior", "--run", str(run), "--level", "0", "--steps", "5"]) == 1
    assert "--preset: a new run needs an architecture" in capsys.readouterr().err


def test_large_models_on_a_cpu_and_other_grids_are_warned_of(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "free_memory", lambda device: 10**9)
    command = ["train-prior", "--run", str(project), "--level", "0", "--preset", "imagenet256-top", "--steps", "5"]
    assert main([*command, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "1.7 billion parameters" in lines(captured.out)["model"]
    assert "warning: 1.7 billion parameters are too many for a CPU" in captured.err
    assert "warning: imagenet256-top is meant for grids of 32 x 32 codes, these are 2 x 2" in captured.err
    assert "warning: the memory does not suffice; not even a row at a time fits" in captured.err


def test_parts_are_advised_where_a_batch_does_not_fit(tmp_path: Path) -> None:
    model = PRESETS["tiny-single"][1]

    def needs(parts: int) -> int:
        config = TrainConfig(steps=1, batch_size=20, accumulate=parts)
        return training_memory(model, config, image_size=(16, 16)).peak

    start = Start(
        run=tmp_path,
        model=model,
        config=TrainConfig(steps=1, batch_size=20, device="cpu"),
        data=(),
        rows=10,
        size=(16, 16),
    )
    whole, four, five = needs(1), needs(4), needs(5)
    assert summary._peak(start) == whole
    assert summary._peak(start, 5) == five
    # 3 is no number of equal parts of 20.
    assert summary._advice(start, four).startswith("--accumulate 4, or --batch-size 5, takes about ")
    assert summary._advice(start, four - 1).startswith("--accumulate 5, or --batch-size 4, takes about ")
    assert "not even a row" in summary._advice(start, 10_000)
    warned = summary._warnings(start, 10, "cpu", whole, four)
    assert warned == [f"the memory does not suffice; {summary._advice(start, four)}"]
    assert summary._warnings(start, 10, "cpu", whole, whole) == []
    assert summary._warnings(start, 10, "cpu", whole, None) == []


def test_a_duration_is_expected_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (
        Measured(device="H100", seconds=2, source="a.json"),
        Measured(device="1 CPU core", seconds=90, source="b.json"),
    )
    monkeypatch.setattr(summary, "MEASURED", {"digits": times})
    command = [*DIGITS, "--run", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == 0
    assert lines(capsys.readouterr().out)["duration"] == "about 6 min: 90 s per 1000 steps on 1 CPU core"
    for other in (["--batch-size", "32"], ["--size", "16"], ["--set", "channels=8"]):
        assert main([*command, *other]) == 0
        assert "duration" not in lines(capsys.readouterr().out)
    monkeypatch.setattr(summary, "device_title", lambda device: "NVIDIA H100 80GB HBM3")
    assert main([*command, "--steps", "500000"]) == 0
    assert lines(capsys.readouterr().out)["duration"] == "about 17 min: 2 s per 1000 steps on H100"


def test_a_classifier_says_what_it_learns_from(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(project)
    assert main(["train-classifier", "--run", str(project), "--steps", "10", "--dry-run"]) == 0
    found = lines(capsys.readouterr().out)
    assert found["images"] == "1797, 32 x 32, grey"
    assert found["split"] == "899 to train on, 898 held out"
    assert found["model"].startswith("Classifier, ")
    assert contents(project) == before


def test_of_several_processes_memory_and_device_are_each_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config = PRESETS["tiny-pixelcnn"][1], TrainConfig(steps=1, batch_size=32, device="cpu")
    start = Start(run=tmp_path, model=model, config=config, data=(), rows=10, processes=2)
    assert summary.announce(argparse.Namespace(quiet=False, dry_run=False), start)
    found = lines(capsys.readouterr().out)
    assert found["device"] == "cpu (1 CPU core) for each of 2 processes"
    memory = training_memory(model, config, processes=2).peak
    assert found["memory"].startswith(f"about {bytes_text(memory)} of ")
    assert not summary.announce(argparse.Namespace(quiet=True, dry_run=True), start)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(999), "999 bytes"),
        (bytes_text(999_600), "1 MB"),
        (bytes_text(23_663_932), "23.7 MB"),
        (bytes_text(9.24e9), "9.24 GB"),
        (bytes_text(1.2345e12), "1234 GB"),
        (number_text(560_545), "0.561 million"),
        (number_text(999_400_000), "999 million"),
        (number_text(1_666_100_000), "1.7 billion"),
        (time_text(89), "89 s"),
        (time_text(90), "2 min"),
        (time_text(5399), "1 h 30 min"),
        (time_text(2 * 86400 + 3 * 3600), "2 days 3 h"),
    ],
)
def test_quantities_are_said_in_few_digits(text: str, expected: str) -> None:
    assert text == expected
