"""Every command from end to end on tiny data, and what users get to read when they make a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastvq import Pipeline, PixelSNAIL
from fastvq.cli import main
from fastvq.cli.parser import build_parser
from fastvq.data import ImageFolder, image_grid, load_images
from fastvq.data.grid import grid_size

COMMANDS = (
    "demo",
    "train-vqvae",
    "extract",
    "import-codes",
    "train-prior",
    "train-classifier",
    "sample",
    "inpaint",
    "merge",
    "reconstruct",
    "evaluate",
    "plot",
    "info",
)
_CAPTIONS = 16  # pixels
TINY = ["--steps", "4", "--batch-size", "4", "--quiet", "--image-every", "2", "--checkpoint-every", "2"]


def fastvq_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastvq", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve 16 x 24 images in two classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (root / name).mkdir()
        for index in range(6):
            pixels = random.integers(0, 256, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def project(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an autoencoder, codes and both priors."""
    run = tmp_path_factory.mktemp("project") / "run"
    vqvae = ["train-vqvae", "--run", str(run), "--data", str(photos), "--size", "16", "24", "--preset", "tiny", *TINY]
    assert main([*vqvae, "--set", "in_channels=3", "--flip"]) == 0
    assert main(["extract", "--run", str(run), "--copies", "2", "--quiet"]) == 0
    for level, preset in enumerate(("tiny-top", "tiny-bottom")):
        assert main(["train-prior", "--run", str(run), "--level", str(level), "--preset", preset, *TINY]) == 0
    return run


def test_project_holds_what_it_should(project: Path) -> None:
    for run in ("vqvae", "prior0", "prior1"):
        assert {"config.json", "checkpoints", "logs", "images", "model"} <= {p.name for p in (project / run).iterdir()}
        assert list((project / run / "images").glob("*.png"))
        steps = [json.loads(line)["step"] for line in (project / run / "logs" / "metrics.jsonl").open()]
        assert steps[-1] == 4
    rows = json.loads((project / "codes" / "train" / "codes.json").read_text())["rows"]
    held_out = json.loads((project / "codes" / "validation" / "codes.json").read_text())["rows"]
    assert (rows, held_out) == (22, 1)


def test_sample_writes_one_picture(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "samples.png"
    command = ["sample", "--checkpoint", str(project), "-n", "3", "--seed", "5", "--out", str(out), "--quiet"]
    assert main(command) == 0
    assert "seed 5" in capsys.readouterr().out
    first = out.read_bytes()
    # A column for each class, with its name, which is wider than a column and stands upright.
    names = grid_size(3, 16, 24, 2, captions=["cats", "dogs"])[0] - grid_size(3, 16, 24, 2)[0]
    assert names > 20
    assert Image.open(out).size == (2 * 26 + 2, 2 * 18 + 2 + names)
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == first
    assert main([*command, "--overwrite"]) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "kind"), [("s.jpg", "JPEG"), ("s.JPEG", "JPEG"), ("s.webp", "WEBP"), ("s.png", "PNG")]
)
def test_pictures_are_what_their_names_say(name: str, kind: str, tmp_path: Path) -> None:
    sample = ["sample", "--pretrained", "digits", "-n", "4", "--seed", "1", "--quiet", "--out", str(tmp_path / name)]
    assert main(sample) == 0
    drawn = np.asarray(Image.open(tmp_path / name).convert("L")).astype(int)
    assert Image.open(tmp_path / name).format == kind
    assert main([*sample[:-1], str(tmp_path / "exact.png")]) == 0
    exact = np.asarray(Image.open(tmp_path / "exact.png")).astype(int)
    assert np.abs(drawn - exact).mean() < (3 if kind == "JPEG" else 1e-9)


def test_folders_of_samples_may_have_a_point_in_their_name(tmp_path: Path) -> None:
    out = tmp_path / "at-0.9"
    assert main(["sample", "--pretrained", "digits", "-n", "1", "--out", str(out), "--quiet"]) == 0
    assert (out / "000000.png").is_file()


def test_sample_writes_a_folder(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    options = ["--label", "dogs", "--temperature", "0.5", "0.9", "--top-k", "5", "--top-p", "0.9", "--seed", "1"]
    assert main(["sample", "--checkpoint", str(project), "-n", "3", *options, "--out", str(out), "--quiet"]) == 0
    settings = json.loads((out / "samples.json").read_text())
    assert settings["labels"] == [1, 1, 1]
    assert settings["class_names"] == ["cats", "dogs"]
    assert settings["temperature"] == [0.5, 0.9]
    assert [Image.open(out / f"{i:06d}.png").size for i in range(3)] == [(24, 16)] * 3
    codes = load_file(out / "codes.safetensors")
    assert {name: tuple(grid.shape) for name, grid in codes.items()} == {"level0": (3, 2, 3), "level1": (3, 4, 6)}


def test_sample_does_not_replace_other_folders(project: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    command = ["sample", "--checkpoint", str(project), "-n", "1", "--out", str(tmp_path), "--overwrite", "--quiet"]
    assert main(command) == 1
    assert (tmp_path / "thesis.tex").read_text() == "words"


@pytest.mark.parametrize("source", ["project", "model"])
def test_reconstruct(project: Path, photos: Path, tmp_path: Path, source: str) -> None:
    checkpoint = project if source == "project" else project / "vqvae" / "model"
    size = [] if source == "project" else ["--size", "16", "24"]
    out = tmp_path / "r.png"
    command = ["reconstruct", "--checkpoint", str(checkpoint), "--data", str(photos), "-n", "3", "--out", str(out)]
    assert main([*command, *size, "--quiet"]) == 0
    assert Image.open(out).size == (3 * 26 + 2, 2 * 18 + 2)
    dataset = ImageFolder(photos, (16, 24))
    assert dataset.labels is not None
    shown = [0, 3, 6]
    assert dataset.labels[shown].tolist() == [0, 0, 1]
    above = image_grid(load_images(dataset, shown), 3)[:18]
    assert np.array_equal(np.array(Image.open(out))[:18], above)


def test_info_of_a_project_a_model_and_the_installation(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--checkpoint", str(project)]) == 0
    text = capsys.readouterr().out
    assert "16 x 24" in text
    assert "0: cats, 1: dogs" in text
    assert "2 x 3, 4 x 6 (top first), 120 bits" in text
    assert main(["info", "--checkpoint", str(project / "prior1" / "model")]) == 0
    assert "PixelSNAIL" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "imagenet256-top" in capsys.readouterr().out


def test_info_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "imagenet256", "--size", "256"]) == 0
    text = capsys.readouterr().out
    assert "imagenet256: VQVAE2, " in text
    assert "codes of 256 x 256 images: 32 x 32, 64 x 64 (top first)" in text
    assert main(["info", "--preset", "imagenet256-top", "--set", "dropout=0.5"]) == 0
    text = capsys.readouterr().out
    assert "1666.10 million parameters" in text
    assert "dropout = 0.5" in text
    assert "for 1 at a time" in text


def test_info_of_training_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    batch = ["--batch-size", "32", "--processes", "2", "--accumulate", "2", "--bf16", "--ema", "0"]
    assert main(["info", "--preset", "digits-top", "--train", *batch]) == 0
    text = capsys.readouterr().out
    found = dict(re.findall(r"^  (\w+) +([\d.]+) MB", text, re.MULTILINE))
    parameters = sum(parameter.numel() for parameter in PixelSNAIL.from_preset("digits-top").parameters())
    assert "batches of 32, of each of 2 processes" in text
    assert found["gradients"] == f"{4 * parameters / 1e6:.2f}"
    assert found["average"] == "0.00"
    kept = [float(found[name]) for name in ("weights", "optimizer", "batch", "activations")]
    assert float(found["peak"]) > sum(kept)
    assert main(["info", "--preset", "tiny", "--train", "--batch-size", "4"]) == 1
    assert "fastvq: error: --size: this model's memory depends" in capsys.readouterr().err


def test_saved_pipeline_is_a_checkpoint(project: Path, tmp_path: Path) -> None:
    from fastvq.cli.project import load_pipeline

    load_pipeline(project, None, "cpu").save_pretrained(tmp_path / "saved")
    for checkpoint, name in ((project, "a"), (tmp_path / "saved", "b")):
        command = ["sample", "--checkpoint", str(checkpoint), "-n", "2", "--seed", "3", "--quiet"]
        assert main([*command, "--out", str(tmp_path / f"{name}.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_finished_run_is_not_overwritten_and_resumes_at_once(
    project: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-vqvae", "--run", str(project), "--data", str(photos), "--size", "16", "24", "--preset", "tiny"]
    command += [*TINY, "--set", "in_channels=3", "--flip"]
    weights = (project / "vqvae" / "model" / "model.safetensors").read_bytes()
    assert main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert (project / "vqvae" / "model" / "model.safetensors").read_bytes() == weights
    assert main([*command, "--resume", "--shift", "1"]) == 1
    assert "shift: 0 there, 1 now" in capsys.readouterr().err


def test_unconditional_prior(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(project, run, ignore=shutil.ignore_patterns("prior*"))
    for level, preset in enumerate(("tiny-top", "tiny-bottom")):
        command = ["train-prior", "--run", str(run), "--level", str(level), "--preset", preset, "--unconditional"]
        assert main([*command, *TINY]) == 0
    assert main(["sample", "--checkpoint", str(run), "-n", "1", "--out", str(tmp_path / "s.png"), "--quiet"]) == 0


def test_demo_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "--effort", "0.002", "--quiet"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "validation NLL" in said
    assert re.search(r"\d+ grids? of 4 x 4 codes: naive .* times as fast; 0 of \d+ codes differ", said)
    assert Image.open(out / "samples.png").size == (342, 342 + _CAPTIONS)
    assert Image.open(out / "reconstructions.png").size == (20 * 34 + 2, 2 * 34 + 2 + _CAPTIONS)
    assert Pipeline.from_pretrained(out / "pipeline").num_classes == 10
    samples = (out / "samples.png").read_bytes()
    assert main(command) == 1
    shutil.rmtree(out / "prior1")
    (out / "samples.png").unlink()
    assert main([*command, "--resume"]) == 0
    assert (out / "samples.png").read_bytes() == samples


def test_shipped_digits_sample_in_class(tmp_path: Path) -> None:
    out = tmp_path / "sevens.png"
    command = ["sample", "--pretrained", "digits", "--label", "7", "-n", "4", "--seed", "0", "--out", str(out)]
    assert main([*command, "--quiet"]) == 0
    assert Image.open(out).size == (70, 70)


def test_shipped_digits_look_like_their_class() -> None:
    """A nearest-neighbour classifier of real digits agrees with the label asked for."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    real = load_digits()
    labels = torch.arange(10).repeat(20)
    images = Pipeline.from_pretrained("digits").sample(200, label=labels, temperature=0.9, seed=0).images
    small = torch.nn.functional.avg_pool2d(images, 4).flatten(1).add(1).mul(8)  # 8 x 8 pixels in 0..16
    predicted = KNeighborsClassifier(3).fit(real.data, real.target).predict(small.numpy())
    assert (predicted == labels.numpy()).mean() >= 0.85


@pytest.mark.parametrize("module", ["torch", "numpy", "triton"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys; from fastvq.cli import main\ntry: main(['--help'])\nfinally: assert '{module}' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert ("--device" in capsys.readouterr().out) == (
        command not in ("import-codes", "merge", "plot")
    )  # which compute nothing


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "--pretrained", "digitz"], "--pretrained: 'digitz'"),
        (["sample", "--checkpoint", "no/such/folder"], "no folder no/such/folder"),
        (["sample", "--checkpoint", "emoji"], "no folder emoji; the model that ships is --pretrained emoji"),
        (["sample", "--pretrained", "digits", "--label", "ten"], "'ten'"),
        (["sample", "--pretrained", "digits", "--label", "10"], "0..9"),
        (["sample", "--pretrained", "digits", "-n", "0"], "-n"),
        (["sample", "--pretrained", "digits", "--temperature", "nan"], "--temperature:"),
        (["sample", "--pretrained", "digits", "--temperature", "1", "1", "1"], "--temperature:"),
        (["sample", "--pretrained", "digits", "--top-k", "0"], "--top-k:"),
        (["sample", "--pretrained", "digits", "--top-p", "2"], "--top-p:"),
        (["sample", "--pretrained", "digits", "--micro-batch", "0"], "--micro-batch:"),
        (["sample", "--pretrained", "digits", "--engine", "warp"], "warp"),
        (["sample", "--pretrained", "digits", "--device", "abacus"], "abacus"),
        (["reconstruct", "--pretrained", "digits", "--data", "nowhere"], "nowhere"),
        (["sample", "--pretrained", "digits", "--out", "a.gif"], "--out: expected a picture's name that ends in .png"),
        (["sample", "--pretrained", "digits", "--out", "a.pgn"], "got a.pgn"),
        (["sample", "--pretrained", "digits", "-n", "250000", "--out", "a.webp"], "--out: WEBP holds 16383 pixels"),
        (["reconstruct", "--pretrained", "digits", "--data", "nowhere"], "--data: nowhere does not exist"),
        (["reconstruct", "--pretrained", "digits", "--data", "digits", "--size", "30"], "--size: expected positive"),
        (["reconstruct", "--pretrained", "digits", "--data", "digits", "--size", "-8"], "--size: must be at least 1"),
        (["reconstruct", "--pretrained", "digits", "--data", "digits", "--out", "a.tif"], "--out: expected a name"),
        (["extract", "--run", "nowhere"], "train-vqvae"),
        (["train-prior", "--run", "nowhere", "--level", "0", "--preset", "tiny-top", "--steps", "1"], "nowhere"),
        (["train-vqvae", "--run", "r", "--data", "nowhere", "--size", "32", "--steps", "1"], "nowhere"),
        (["train-vqvae", "--run", "r", "--data", "digits", "--preset", "bogus", "--steps", "1"], "bogus"),
        (["train-vqvae", "--run", "r", "--data", "digits", "--preset", "tiny-top", "--steps", "1"], "prior"),
        (["train-vqvae", "--run", "r", "--data", "digits", "--preset", "tiny", "--set", "x", "--steps", "1"], "--set"),
        (["train-vqvae", "--run", "r", "--data", "digits", "--preset", "tiny", "--steps", "0"], "--steps:"),
        (["train-vqvae", "--run", "r", "--data", "digits", "--preset", "imagenet256", "--steps", "1"], "channel"),
        (["train-vqvae", "--run", "r", "--data", "x", "--size", "31", "--preset", "tiny", "--steps", "1"], "--size"),
        (["demo", "--out", "r", "--label", "10"], "0..9"),
        (["demo", "--out", "r.jpg"], "--out: expected the name of a folder"),
        (["demo", "--out", "r", "--effort", "0"], "--effort"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_line(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastvq: error: ")
    assert message in error
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == []


def test_debug_keeps_the_traceback() -> None:
    done = fastvq_command("sample", "--pretrained", "digitz", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_closed_output_is_no_error() -> None:
    code = f"{sys.executable} -m fastvq info | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
