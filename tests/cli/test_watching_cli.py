"""What commands say of the use of codes, how they are told to say it, and the curves of training."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvq.cli import main
from fastvq.cli import plot as plot_module
from fastvq.cli.train import preview_of
from fastvq.data import CodeDataset
from fastvq.evaluation.curves import Panel
from fastvq.models import HierarchicalVQVAE, PixelSNAIL, PriorConfig, load_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--steps", "4", "--batch-size", "4", "--device", "cpu", "--log-every", "2", "--ema", "0"]
NORMAL = ["--set", "codebook_init=normal", "--set", "revive_below=0"]
COLLAPSED = "few codes in use in {}; what codes cannot say is lost, and a prior over them learns nothing:\n" + (
    "    level 0 (top): 1 of 16 codes in use, perplexity 1.0\n"
)


def pictures(folder: Path, *, alike: bool) -> Path:
    """Forty 16 x 24 images in two classes."""
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            pixels = random.integers(0, 256, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(np.full_like(pixels, 128) if alike else pixels).save(folder / name / f"{index:02d}.png")
    return folder


def train(project: Path, data: Path, *options: str) -> None:
    size = ["--size", "16", "24", "--preset", "tiny", "--set", "in_channels=3"]
    command = ["train-vqvae", "--run", str(project), "--data", str(data), *size, *TINY, *options]
    assert main(command) == 0


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, codes, a prior and a classifier."""
    root = tmp_path_factory.mktemp("project")
    train(root / "run", pictures(root / "images", alike=False), "--validate-every", "3", "--quiet")
    assert main(["extract", "--run", str(root / "run"), "--quiet"]) == 0
    prior = ["train-prior", "--run", str(root / "run"), "--level", "1", "--preset", "tiny-bottom", *TINY, "--quiet"]
    assert main(prior) == 0
    classifier = ["--set", "channels=(4,)", *TINY, "--quiet", "--validate-every", "2"]
    assert main(["train-classifier", "--run", str(root / "run"), *classifier]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project without codes, whose images are all the same."""
    root = tmp_path_factory.mktemp("collapsed")
    train(root / "run", pictures(root / "images", alike=True), *NORMAL, "--quiet")
    return root / "run"


def copy(project: Path, tmp_path: Path) -> Path:
    shutil.copytree(project, tmp_path / "run")
    shutil.copytree(project.parent / "images", tmp_path / "images")
    return tmp_path / "run"


def validations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").open()]
    return [line for line in lines if line["split"] == "validation"]


def test_validate_every(project: Path) -> None:
    assert [line["step"] for line in validations(project / "vqvae")] == [3, 4]
    assert [line["step"] for line in validations(project / "classifier")] == [2, 4]
    assert [line["step"] for line in validations(project / "prior1")] == [4]


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = pictures(tmp_path / "images", alike=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(tmp_path / "run", data, "--plain")
    said = capsys.readouterr().err
    assert "\nstep 2/4: loss " in said
    assert "\nstep 4/4: loss " in said
    assert "validation at step 4: MSE " in said
    assert "%|" not in said.partition("step 2/4")[2]


def test_training_says_what_codes_are_used(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = validations(project / "vqvae")[-1]
    lines = [
        f"validation  level {level} ({name}): {round(16 * last[f'usage_{level}'])} of 16 codes in use, "
        f"perplexity {last[f'perplexity_{level}']:.1f}"
        for level, name in enumerate(("top", "bottom"))
    ]
    assert main(["train-vqvae", "--run", str(copy(project, tmp_path)), "--resume", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == lines
    assert main(["info", "--checkpoint", str(project)]) == 0
    assert set(lines) < set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "with-progress"])
def test_a_collapse_is_said_at_the_end_of_training(
    quiet: bool, collapsed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", collapsed.parent / "images", *NORMAL, *(["--quiet"] if quiet else []))
    captured = capsys.readouterr()
    assert captured.err.count(COLLAPSED.format("validation")) == 1
    # What is said is the last that goes to stderr.
    assert "(now 0)" in captured.err.partition(COLLAPSED.format("validation"))[2]
    assert "validation  level 0 (top): 1 of 16 codes in use, perplexity 1.0\n" in captured.out


def test_a_collapse_is_said_by_info(collapsed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--checkpoint", str(collapsed)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(COLLAPSED.format("validation")) == 1
    assert "--set revive_below=1" in captured.err


@pytest.mark.parametrize("shards", [False, True], ids=["extract", "merge"])
def test_a_collapse_is_said_of_codes(
    shards: bool, collapsed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(collapsed, tmp_path)
    data = ["--data", str(tmp_path / "images"), "--quiet"]
    if shards:
        for part in ("0/2", "1/2"):
            assert main(["extract", "--run", str(run), "--shard", part, *data]) == 0
        assert "few codes" not in capsys.readouterr().err
    assert main(["merge", str(run)] if shards else ["extract", "--run", str(run), *data]) == 0
    captured = capsys.readouterr()
    for name in ("training", "validation"):
        assert f"{name:11} level 0 (top): 1 of 16 codes in use, perplexity 1.0\n" in captured.out
    assert captured.err.count(COLLAPSED.format("training")) == captured.err.count("fastvq: warning") == 1


def test_info_reads_codes_where_no_validation_was_logged(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(project, tmp_path)
    shutil.rmtree(run / "vqvae" / "logs")
    assert main(["info", "--checkpoint", str(run)]) == 0
    use = CodeDataset(run / "codes" / "train").use(1)
    assert f"training    {use}\n" in capsys.readouterr().out


# ---- Pictures


def test_samples_are_of_all_classes_with_their_names(project: Path) -> None:
    codes = CodeDataset(project / "codes" / "train")
    vqvae = load_pretrained(project / "vqvae" / "model")
    assert isinstance(vqvae, HierarchicalVQVAE)
    bottom = load_pretrained(project / "prior1" / "model")
    assert isinstance(bottom, PixelSNAIL)
    found = preview_of(vqvae, codes, 1)(bottom, 4)
    assert (found.columns, found.captions) == (2, ["cats", "dogs"])
    assert found.images.shape == (16, 3, 16, 24)


def test_samples_without_classes_have_no_names(project: Path) -> None:
    codes = CodeDataset(project / "codes" / "train")
    vqvae = load_pretrained(project / "vqvae" / "model")
    assert isinstance(vqvae, HierarchicalVQVAE)
    bottom = load_pretrained(project / "prior1" / "model")
    top = _unconditional(bottom.config, codes)
    found = preview_of(vqvae, codes, 0)(top, 4)
    assert (found.columns, found.captions) == (None, None)
    codes.labels = None
    found = preview_of(vqvae, codes, 0)(top, 4)
    assert found.captions is None
    assert found.images.shape == (16, 3, 16, 24)


def _unconditional(config: PriorConfig, codes: CodeDataset) -> PixelSNAIL:
    fields = {"level": 0, "shape": codes.shapes[0], "num_classes": None}
    top = {**config.to_dict(), **fields, "condition_shapes": (), "condition_num_codes": ()}
    return PixelSNAIL(type(config).from_dict(top)).eval()  # type: ignore[arg-type]


# ---- Curves


def test_curves_of_a_project(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves.png"
    assert main(["plot", str(project), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"curves of vqvae, prior1, classifier in {out}\n"
    pixels = np.asarray(Image.open(out).convert("L"))
    assert pixels.shape == (round(3 * 3.2 * 90), round(4 * 4.2 * 90))
    assert (pixels < 128).mean() > 0.005
    first = out.read_bytes()
    assert main(["plot", str(project), "--out", str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == first


def test_curves_of_one_run_lie_in_it(project: Path, tmp_path: Path) -> None:
    run = copy(project, tmp_path)
    (run / "prior1" / "curves.png").write_bytes(b"")
    assert main(["plot", str(run / "prior1"), "--overwrite"]) == 0
    assert Image.open(run / "prior1" / "curves.png").format == "PNG"


def test_what_the_curves_are(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, list[Panel]] = {}
    monkeypatch.setattr(plot_module, "draw_panels", lambda rows, path: drawn.update(rows))
    assert main(["plot", str(project), "--out", str(tmp_path / "x.png")]) == 0
    titles = {name: [panel.title for panel in panels] for name, panels in drawn.items()}
    assert titles == {
        "vqvae": ["loss", "mean squared error", "perplexity", "learning rate"],
        "prior1": ["NLL, bits per code", "learning rate"],
        "classifier": ["NLL, nats per image", "accuracy", "learning rate"],
    }
    lines = validations(project / "vqvae")
    assert drawn["vqvae"][1].curves["validation"] == ([3, 4], [line["mse"] for line in lines])
    assert drawn["vqvae"][2].curves["level 1 (bottom)"] == ([3, 4], [line["perplexity_1"] for line in lines])
    bits = drawn["prior1"][0]
    assert bits.curves["validation"] == ([4], [validations(project / "prior1")[0]["bits"]])
    assert bits.curves["training"][0] == [2, 4]
    assert bits.bound == ("4 without a prior", 4.0)
    rates = drawn["vqvae"][3].curves["training"]
    assert rates[0] == [2, 4]
    assert rates[1][0] > rates[1][1]


def test_curves_need_matplotlib(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(project), "--out", str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr().err
    assert 'pip install "fastvq[eval]"' in said
    assert "--no-curves" not in said
    assert not (tmp_path / "x.png").exists()


def test_a_folder_without_a_log_has_no_curves(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vqvae" / "logs").mkdir(parents=True)
    (tmp_path / "vqvae" / "logs" / "metrics.jsonl").write_text("")
    for folder in (tmp_path, tmp_path / "vqvae", project / "codes"):
        assert main(["plot", str(folder)]) == 1
        assert f"fastvq: error: RUN: {folder} holds no log of training" in capsys.readouterr().err


def test_a_damaged_log_has_no_curves(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy(project, tmp_path)
    log = run / "prior1" / "logs" / "metrics.jsonl"
    log.write_text("{}\n" + log.read_text())
    assert main(["plot", str(run)]) == 1
    assert f"{log}: not a log of metrics" in capsys.readouterr().err
    assert not (run / "curves.png").exists()
