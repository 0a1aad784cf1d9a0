"""``fastvq train-classifier`` and ``fastvq evaluate`` from end to end on tiny data, and what mistakes say."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvq.cli import main
from fastvq.cli.parser import build_parser

TINY = ["--steps", "4", "--batch-size", "4", "--quiet", "--checkpoint-every", "2", "--device", "cpu"]
QUICK = ["-n", "40", "--keep", "1.0", "0.5", "--no-curves", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty 16 x 16 grey images in two classes, dark and light."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (root / name).mkdir()
        for index in range(20):
            Image.fromarray(random.integers(low, low + 128, (16, 16), dtype=np.uint8)).save(
                root / name / f"{index}.png"
            )
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with everything but a classifier."""
    run = tmp_path_factory.mktemp("project") / "run"
    images = ["--image-every", "4"]
    options = ["--data", str(photos), "--size", "16", "--preset", "tiny", "--validation", "0.3"]
    assert main(["train-vqvae", "--run", str(run), *options, *images, *TINY]) == 0
    assert main(["extract", "--run", str(run), "--quiet", "--device", "cpu"]) == 0
    for level, preset in enumerate(("tiny-top", "tiny-bottom")):
        command = ["train-prior", "--run", str(run), "--level", str(level), "--preset", preset]
        assert main([*command, *images, *TINY]) == 0
    return run


@pytest.fixture(scope="module")
def classified(run: Path) -> Path:
    """The same project with a classifier of four features."""
    fields = ["--set", "channels=8,", "--set", "features=4"]
    assert main(["train-classifier", "--run", str(run), *fields, *TINY]) == 0
    return run


def test_without_a_classifier_there_are_no_sample_metrics(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Other tests may have given the project a classifier by now.
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("classifier", "features"))
    assert main(["evaluate", str(tmp_path / "run"), *QUICK]) == 0
    text = capsys.readouterr().out
    assert "nats per code" in text
    assert "bits per dimension" in text
    assert "No sample metrics: they need features" in text
    assert "FID" not in text


def test_train_classifier_keeps_the_rules_of_runs(classified: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = classified / "classifier"
    assert {"config.json", "checkpoints", "logs", "model"} <= {path.name for path in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["split"] == "validation"
    assert 0 <= lines[-1]["top1"] <= 1
    description = json.loads((folder / "config.json").read_text())
    assert description["model"]["num_classes"] == 2
    # Those that the autoencoder holds out are held out.
    assert description["data"]["images"] == 28
    command = ["train-classifier", "--run", str(classified), "--set", "channels=8,", "--set", "features=4", *TINY]
    assert main(command) == 1
    assert "is not empty; resume it" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "validation top-1 accuracy" in capsys.readouterr().out


def test_a_report(classified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    command = ["evaluate", str(classified), *QUICK, "--accuracy-steps", "3", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    numbers = json.loads((out / "evaluation.json").read_text())
    title = numbers["extractor"]["title"]
    assert numbers["extractor"]["digest"].startswith(title.split()[1])
    pictures = {"reconstructions.png", "samples.png", "neighbours.png"}
    names = {"README.md", "report.html", "evaluation.json", "curve.json", *pictures}
    assert {path.name for path in out.iterdir()} == names
    page = (out / "README.md").read_text()
    for part in (text, page):
        assert f"FID [{title}]" in part
        assert "| FID " not in part.replace(f"FID [{title}]", "")
        assert f"precision [{title}]" in part
        assert "flatters" in part
    assert "curve.png" not in page
    assert "Samples are of all classes in turn" in page
    assert all(name in page for name in ("reconstructions.png", "samples.png", "neighbours.png"))
    assert numbers["sets"]["samples"]["images"] == 40
    assert numbers["sets"]["samples"]["frechet"] >= 0
    assert set(numbers["accuracy"]) == {"samples", "reconstructions", "real images"}
    assert [len(numbers["images"][name]["levels"]) for name in ("training", "validation")] == [2, 2]
    assert numbers["environment"]["processor"]
    assert [point["keep"] for point in json.loads((out / "curve.json").read_text())["points"]] == [1.0, 0.5]
    (cache,) = (classified / "evaluation").iterdir()
    written = cache.stat().st_mtime_ns

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(command) == 1
    assert "is not empty; overwrite it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command, "--overwrite", "--seed", "0"]) == 0
    again = json.loads((out / "evaluation.json").read_text())
    for name in ("images", "sets", "curve", "accuracy", "memorisation"):
        assert again[name] == numbers[name], name
    assert cache.stat().st_mtime_ns == written
    assert list((classified / "evaluation").iterdir()) == [cache]


def test_a_report_replaces_nothing_else(classified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    command = ["evaluate", str(classified), *QUICK, "--overwrite"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "holds other things than a report" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "thesis.tex")]) == 1
    assert "is a file and stays as it is" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_curve_is_drawn(classified: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(classified), *QUICK, "--out", str(tmp_path / "report")]
    command.remove("--no-curves")
    assert main(command) == 0
    assert Image.open(tmp_path / "report" / "curve.png").size == (900, 306)
    assert "curve.png" in (tmp_path / "report" / "README.md").read_text()


def test_curves_without_matplotlib_are_refused_at_once(
    classified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = ["evaluate", str(classified), *QUICK, "--out", str(tmp_path / "report")]
    command.remove("--no-curves")
    assert main(command) == 1
    captured = capsys.readouterr()
    assert 'pip install "fastvq[eval]"' in captured.err
    assert "--no-curves" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "report").exists()


def test_features_and_rejection_by_different_networks(
    classified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = ["--set", "channels=8,", "--set", "features=3", "--seed", "7", "--name", "features"]
    assert main(["train-classifier", "--run", str(classified), *fields, *TINY]) == 0
    features = str(classified / "features")
    options = ["--features", features, "--cache", str(tmp_path), "--classes-by", "frequency"]
    assert main(["evaluate", str(classified), *QUICK, *options]) == 0
    text = capsys.readouterr().out
    assert "Samples are of each class as often as training" in text
    assert "3 features" in text
    assert "flatters" not in text
    assert "No classification accuracy score: --accuracy-steps" in text
    assert len(list(tmp_path.iterdir())) == 1


def test_a_shipped_model_needs_data_and_takes_any_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--pretrained", "digits", "--quiet"]) == 1
    assert "--data: a shipped model holds no data.json" in capsys.readouterr().err
    options = ["--data", "digits", "--validation", "0.02", "--quiet", "--device", "cpu", "--batch-size", "256"]
    assert main(["evaluate", "--pretrained", "digits", *options]) == 0
    text = capsys.readouterr().out
    assert "2 x 2 of 128" in text
    assert "58.5x" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "RUN: expected a project folder, or --pretrained NAME, and not both"),
        (["absent"], "RUN: no folder absent"),
        (["{photos}"], "so it is no project folder"),
        (["{run}", "--classifier", "{photos}"], "--classifier: no trained classifier in"),
        (["{run}", "--classifier", "{run}/vqvae"], "--classifier: .* holds a VQVAE2, expected a classifier"),
        (["{run}", "--inception", "absent.pth"], "--inception: no file absent.pth"),
        (["{run}", "--inception", "a", "--features", "b"], "--inception and --features: expected one of them"),
        (["{run}", "--data", "{photos}/dark", "--changed-data"], "--changed-data: .*classes dark, light and .* none"),
        (["{run}", "--keep", "0"], r"--keep: expected numbers in \(0, 1\]"),
        (["{run}", "-n", "0"], "-n: must be at least 1"),
        (["--pretrained", "digits", "--data", "{photos}"], "--data: the priors expect 10 classes, got 2"),
        (["{run}", "--out", "report.png"], "--out: expected the name of a folder, got report.png"),
        (["--pretrained", "absent", "--data", "digits"], "--pretrained: 'absent' is neither a local folder nor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    options: list[str], message: str, classified: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [option.format(run=classified, photos=photos) for option in options]
    assert main(["evaluate", *filled, "--quiet", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err), captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "{photos}/dark", "--size", "16"], "--data: a classifier learns from labels"),
        ([], "--data: .* holds no data.json that says where the images are"),
        (["--data", "digits", "--set", "width=3"], "--set width: ClassifierConfig has no such field"),
    ],
    ids=["labels", "no-data", "field"],
)
def test_classifiers_refuse(
    options: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [option.format(photos=photos) for option in options]
    assert main(["train-classifier", "--run", str(tmp_path / "new"), *filled, *TINY]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["evaluate", "train-classifier"])
def test_commands_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert "default" in capsys.readouterr().out
