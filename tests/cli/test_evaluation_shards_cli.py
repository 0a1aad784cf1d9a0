"""``fastvq evaluate --from-shards`` on a model that ships: the report of one process, and what mistakes say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import write_samples
from PIL import Image

from fastvq import Pipeline
from fastvq.cli import main
from fastvq.models.classifier import Classifier, ClassifierConfig

N = 300
DRAW = ["--seed", "4", "--temperature", "0.9"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that lacks the samples: forty images of ten classes, and networks that have learned nothing."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for label in range(10):
        (root / "images" / str(label)).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / str(label) / f"{index}.png")
    for name, seed in (("judge", 0), ("features", 1)):
        torch.manual_seed(seed)
        config = ClassifierConfig(in_channels=1, num_classes=10, channels=(4,), features=5)
        Classifier(config).save_pretrained(root / name)
    networks = ["--classifier", str(root / "judge"), "--features", str(root / "features")]
    data = ["--data", str(root / "images"), "--vectors", "100", "--keep", "1", "0.5", "--no-curves"]
    return ["evaluate", "--pretrained", "digits", *networks, *data, "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "parts"
    write_samples(Pipeline.from_pretrained("digits"), folder, N, 4, seed=4, temperature=0.9)
    return folder


def report(command: list[str], out: Path) -> dict[str, Any]:
    assert main([*command, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def test_a_report_from_parts_has_the_numbers_of_one_process(
    base: list[str], parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = report([*base, "-n", str(N), *DRAW], tmp_path / "alone")
    command = [*base, "--from-shards", str(parts)]
    from_codes = report(command, tmp_path / "codes")
    for index in range(3):
        assert main([*command, "--shard", f"{index}/3"]) == 0
    assert re.search(r"features-\w{12}-00002-of-00003 in .*parts", capsys.readouterr().out)
    scored = sorted(path.name for path in parts.iterdir())
    from_features = report([*command, "-n", str(N), "--temperature", "0.9", "0.9"], tmp_path / "features")
    assert sorted(path.name for path in parts.iterdir()) == scored
    for found in (from_codes, from_features):
        assert found["config"] == expected["config"]
        assert found["config"]["samples"] == found["sets"]["samples"]["images"] == N
        ours, theirs = (numbers["sets"].pop("samples") for numbers in (found, json.loads(json.dumps(expected))))
        assert ours.pop("frechet") == pytest.approx(theirs.pop("frechet"), rel=1e-6)
        assert ours.pop("inception") == pytest.approx(theirs.pop("inception"), rel=1e-12)
        assert ours == theirs
        for name in ("curve", "memorisation", "images"):
            assert found[name] == expected[name], name
    assert "sampling" not in from_features["seconds"]
    # The pictures show the same samples.
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in ("alone", "features")]
    assert pictures[0] == pictures[1]
    assert f"{N} samples at temperature 0.9, seed 4." in (tmp_path / "features" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from-shards", "{parts}", "-n", "200"], "-n: the samples in .*parts have 300, got 200; leave it out"),
        (["--from-shards", "{parts}", "--seed", "0"], "--seed: the samples in .*parts have 4, got 0"),
        (
            ["--from-shards", "{parts}", "--temperature", "1"],
            r"--temperature: the samples in .*parts have \(0.9,\), got \(1.0,\)",
        ),
        (["--from-shards", "{parts}", "--shard", "0/2", "--seed", "0"], "--seed: the samples in .*parts have 4"),
        (["--from-shards", "{parts}", "--shard", "2/2"], "--shard: expected I/N with I in 0..N-1, got 2/2"),
        (["--from-shards", "{parts}", "--shard", "half"], "--shard: expected I/N with I in 0..N-1, such as 0/8"),
        (["--from-shards", "{parts}", "--shard", "0/2", "--out", "a"], "--out: the report is made of all parts"),
        (["--shard", "0/2"], "--shard: names a part of the samples in a folder; pass the folder as --from-shards"),
        (["--from-shards", "absent"], "--from-shards: absent holds no finished part"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    options: list[str], message: str, base: list[str], parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*base, *(option.format(parts=parts) for option in options)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err), captured.err


def test_missing_parts_and_features_are_named(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(Pipeline.from_pretrained("digits"), tmp_path / "parts", 20, 4, seed=0)
    command = [*base, "--from-shards", str(tmp_path / "parts")]
    networks = [command.index(name) for name in ("--classifier", "--features")]
    bare = [word for place, word in enumerate(command) if place - 1 not in networks and place not in networks]
    assert main([*bare, "--shard", "0/2"]) == 1
    assert "--shard: there are no features to gather; pass --features" in capsys.readouterr().err
    for path in (tmp_path / "parts").glob("samples-00002-*"):
        path.unlink()
    for more in ([], ["--shard", "0/2"]):
        assert main([*command, *more]) == 1
        error = capsys.readouterr().err
        assert re.search(r"--from-shards: .*parts lacks indices 10\.\.14 of 0\.\.19; run the parts", error), error
