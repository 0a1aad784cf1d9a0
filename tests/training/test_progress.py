"""What a run says while it trains, when it validates, and what it shows."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import (
    VQVAE_CONFIG,
    Noise,
    before,
    dies_by_sigkill,
    files,
    kill_myself,
    make_codes,
    metrics,
    stage1,
    stage2,
    state_tensors,
    train_config,
)

from fastvq.data import CodeDataset, extract_codes, split_indices
from fastvq.data.usage import CodeUse
from fastvq.models import VQVAEConfig, build
from fastvq.models.classifier import ClassifierConfig
from fastvq.training import Picture, loop, train_vqvae
from fastvq.training.classifier import train_classifier
from fastvq.training.codebook import CodebookTraining, few_codes
from fastvq.training.progress import Progress, Show
from fastvq.training.stage1 import _Reconstruction

pytestmark = pytest.mark.usefixtures("one_thread")


class Alike(Noise):
    """The same image over and over, which one code can stand for."""

    def __init__(self, count: int = 40) -> None:
        super().__init__(count)
        self.pixels = torch.zeros_like(self.pixels)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Told:
    """Words of no stage."""

    unit = "rows"
    worry: str | None = None

    def brief(self, metrics: Mapping[str, float]) -> str:
        return f"loss {metrics['loss']}"

    def summary(self, values: Mapping[str, float]) -> str:
        return f"NLL {values['nll']}"

    def concern(self, values: Mapping[str, float]) -> str | None:
        return self.worry if values else None


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, clock: Clock, steps: range, *, each: float, between: float) -> None:
    """Steps that take ``each`` seconds, with ``between`` seconds for other things after each."""
    for step in steps:
        progress.begin_step()
        clock.now += each
        progress.step({"loss": step / 2})
        clock.now += between


# ---- The lines


@pytest.mark.parametrize("show", [True, "plain"])
def test_lines_where_nobody_watches(
    show: Show, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if show == "plain":
        monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock()
    with Progress(Told(), 10, 40, 8, show=show, clock=clock) as progress:
        run(progress, clock, range(10), each=0.5, between=0.0)
        progress.line(20, {"loss": 3.0})
        clock.now += 5.0  # a validation, which is in the time that is left and not in the rate
        progress.validated(20, {"nll": 1.5}, best=True)
        run(progress, clock, range(10), each=0.5, between=0.0)
        progress.line(30, {"loss": 2.0})
        progress.validated(30, {"nll": 1.75}, best=False)
    said = sys.stderr.getvalue() if isinstance(sys.stderr, Terminal) else capsys.readouterr().err
    assert said.splitlines() == [
        "step 20/40: loss 3.0, 16 rows/s, 0:00:10 left",
        "validation at step 20: NLL 1.5 (best so far)",
        "step 30/40: loss 2.0, 16 rows/s, 0:00:08 left",
        "validation at step 30: NLL 1.75",
    ]


def test_the_rate_is_that_of_the_last_steps() -> None:
    clock = Clock()
    progress = Progress(Told(), 0, 1000, 32, show=False, clock=clock)
    run(progress, clock, range(100), each=1.0, between=3.0)
    assert progress._rate() == "32 rows/s"
    run(progress, clock, range(50), each=0.01, between=3.0)
    assert progress._rate() == "3200 rows/s"


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock()
    with Progress(Told(), 0, 10, 8, show=True, clock=clock) as progress:
        run(progress, clock, range(10), each=0.25, between=0.0)
        progress.line(10, {"loss": 1.0})
        progress.validated(10, {"nll": 1.5}, best=False)
    said = sys.stderr.getvalue()
    assert "step 10/10" not in said
    assert "\nvalidation at step 10: NLL 1.5\n" in said.replace("\r", "\n")
    assert re.search(r"100%\|.*\| 10/10 \[.*, 32 rows/s, loss 4\.5\]", said)


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    told, clock = Told(), Clock()
    told.worry = "bad"
    with Progress(told, 0, 10, 8, show=False, clock=clock) as progress:
        run(progress, clock, range(10), each=0.25, between=0.0)
        progress.line(10, {"loss": 1.0})
        progress.validated(10, {"nll": 1.5}, best=False)
    assert capsys.readouterr() == ("", "")


def test_a_concern_is_said_first_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told()
    with Progress(told, 0, 5, 8, show="plain", clock=Clock()) as progress:
        for step, worry in enumerate([None, "one", "two", "three", "four"], 1):
            told.worry = worry
            progress.judge(step, {"nll": 1.0})
    assert capsys.readouterr().err.splitlines() == ["fastvq: warning: one", "fastvq: warning: four"]


def test_a_concern_that_has_gone_is_not_said_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told()
    with Progress(told, 0, 2, 8, show="plain", clock=Clock()) as progress:
        for step, worry in enumerate(["one", None], 1):
            told.worry = worry
            progress.judge(step, {"nll": 1.0})
    assert capsys.readouterr().err.splitlines() == ["fastvq: warning: one"]


# ---- What each stage says


def test_words_of_an_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = train_config(steps=6, validate_every=4, validation_fraction=0.2)
    stage1(tmp_path, config, progress="plain")
    said = capsys.readouterr().err.splitlines()
    last, trained = metrics(tmp_path, "validation")[-1], metrics(tmp_path, "train")[-1]
    assert [line.split(":")[0] for line in said if line.startswith(("step", "valid"))] == [
        "step 3/6",
        "validation at step 4",
        "step 6/6",
        "validation at step 6",
    ]
    used = [round(8 * trained[f"usage_{level}"]) for level in range(2)]
    words = f"loss {trained['loss']:.4f}, perplexity {trained['perplexity_0']:.3g}/{trained['perplexity_1']:.3g}"
    line = next(line for line in said if line.startswith("step 6/6"))
    assert line.startswith(f"step 6/6: {words}, in use {used[0]}/{used[1]} of 8, ")
    assert re.search(r", [\d.e+]+ images/s, 0:00:00 left$", line)
    line = next(line for line in said if line.startswith("validation at step 6"))
    levels = [
        f"level {level} ({name}): {round(8 * last[f'usage_{level}'])} of 8 codes in use, "
        f"perplexity {last[f'perplexity_{level}']:.1f}"
        for level, name in enumerate(("top", "bottom"))
    ]
    said_of = f"MSE {last['mse']:.4f}, PSNR {last['psnr']:.1f} dB; {levels[0]}; {levels[1]}"
    assert line.removesuffix(" (best so far)") == f"validation at step 6: {said_of}"


def test_words_of_a_prior(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = make_codes(tmp_path / "codes")
    stage2(codes, tmp_path / "run", train_config(steps=4, validate_every=2), progress="plain")
    said = capsys.readouterr().err
    first, last = metrics(tmp_path / "run", "validation")
    assert f"step 2: NLL {first['nll']:.4f} nats, {first['bits']:.3f} bits per code (3 without a prior)" in said
    assert f"step 4: NLL {last['nll']:.4f} nats, {last['bits']:.3f} bits per code" in said
    assert said.count("without a prior") == 1
    loss = metrics(tmp_path / "run", "train")[-1]["loss"]
    assert f"step 4/4: loss {loss:.4f}, {loss / math.log(2):.3f} bits per code, " in said
    assert "rows/s" in said


def test_words_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = train_config(steps=4, validate_every=3, validation_fraction=0.3)
    train_classifier(
        Noise(), ClassifierConfig(in_channels=1, num_classes=3, channels=(4,)), config, tmp_path, progress="plain"
    )
    said = capsys.readouterr().err
    first, last = metrics(tmp_path, "validation")
    assert (first["step"], last["step"]) == (3, 4)
    assert f"step 4: NLL {last['nll']:.4f} nats, top-1 accuracy {100 * last['top1']:.2f} %" in said
    assert f"accuracy {100 * metrics(tmp_path, 'train')[-1]['accuracy']:.0f} %, " in said


# ---- The use of codes


@pytest.mark.parametrize("accumulate", [1, 2])
def test_share_of_codes_in_use_of_a_batch(accumulate: int, tmp_path: Path) -> None:
    """With parts it is that of the whole batch."""
    config = dataclasses.replace(VQVAE_CONFIG, codebook_init="normal", revive_below=0.0)
    train_vqvae(Noise(), config, train_config(steps=2, log_every=1, accumulate=accumulate), tmp_path)
    torch.manual_seed(train_config().seed)
    model = build(config).eval()
    rows, _ = loop.StepBatches(lambda rows, epochs: (), 20, 8, 0).rows(0)
    training, _ = split_indices(22, 0.1, 0)
    found = metrics(tmp_path, "train")[0]
    for level, codes in enumerate(model.encode(Noise().pixels[training[rows]])):
        assert found[f"usage_{level}"] == pytest.approx(len(codes.unique()) / 8)


def test_a_level_that_uses_few_codes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = train_config(steps=6, validate_every=2, validation_fraction=0.2)
    stage1(tmp_path, config, dataset=Alike(), augment=None, progress="plain")
    said = capsys.readouterr().err
    assert {line["perplexity_0"] for line in metrics(tmp_path, "validation")} == {1.0}
    assert said.count("fastvq: warning: few codes in use in validation") == 2
    first, second = (found.start() for found in re.finditer("fastvq: warning", said))
    assert said.index("validation at step 2") < first < said.index("validation at step 4")
    assert said.index("validation at step 6") < second
    assert said.count("    level 0 (top): 1 of 8 codes in use, perplexity 1.0\n") == 2
    assert "--set revive_below=1 (now 0.01)" in said


def test_few_codes_are_seen_without_validation_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concern = _Reconstruction.concern

    def collapsed_in_training(task: _Reconstruction, values: Mapping[str, float]) -> str | None:
        return concern(task, {**values, "perplexity_1": 1.0, "usage_1": 1 / 8} if "loss" in values else values)

    monkeypatch.setattr(_Reconstruction, "concern", collapsed_in_training)
    stage1(tmp_path, train_config(steps=5, validation_fraction=0.0), progress="plain")
    said = capsys.readouterr().err
    assert said.count("fastvq: warning: few codes in use in the last steps") == 2
    assert said.count("level 1 (bottom): 1 of 8 codes in use, perplexity 1.0") == 2


def test_codes_that_hardly_vary_are_said_before_a_prior_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = build(VQVAE_CONFIG).eval()
    extract_codes(model, Alike(), range(36), tmp_path / "train")
    extract_codes(model, Alike(), range(36, 40), tmp_path / "validation")
    assert CodeDataset(tmp_path / "train").use(0).used == 1
    stage2(tmp_path, tmp_path / "run", train_config(steps=3), progress="plain")
    said = capsys.readouterr().err
    warnings = [found.start() for found in re.finditer("fastvq: warning: the codes hardly vary", said)]
    assert len(warnings) == 2
    assert warnings[0] < said.index("step 3/3") < said.index("validation at step 3") < warnings[1]
    assert f"in {tmp_path / 'train'}\n    level 0 (top): 1 of 8 codes in use, perplexity 1.0\n" in said


def test_codes_that_vary_are_no_concern(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CodeDataset, "use", lambda self, level, most: CodeUse(level, 2, 8, 7, 6.0, 80))
    stage2(make_codes(tmp_path / "codes"), tmp_path / "run", train_config(steps=3), progress="plain")
    said = capsys.readouterr().err
    assert "validation at step 3" in said
    assert "warning" not in said


def collapsed(level: int) -> CodeUse:
    return CodeUse(level, 2, 512, used=1, perplexity=1.0, vectors=4000)


@pytest.mark.parametrize(
    ("model", "train", "images", "said", "unsaid"),
    {
        "settings": (
            {},
            {},
            10_000,
            [
                "--set revive_below=1 (now 0)",
                "batch size 32",
                "rate 0.0003 can stay",
            ],
            ["--lr", "--batch-size", "more images"],
        ),
        "a-limit-that-cannot-act": (
            {"revive_below": 0.1},
            {},
            10_000,
            ["--set revive_below=1 (now 0.1)"],
            ["codebook_init", "--lr"],
        ),
        "small-batch": (
            {"revive_below": 1.0},
            {"batch_size": 4},
            10_000,
            ["--batch-size 16 or --set num_codes=128: a batch of 4 has 256 vectors of level 0 (top) for 512 codes"],
            ["codebook_init", "more images"],
        ),
        "few-images": (
            {"revive_below": 1.0},
            {},
            50,
            ["more images or --set num_codes=256: 45 training images have 2880 vectors of level 0 (top) for 512"],
            ["--batch-size"],
        ),
        "high-rate": (
            {"revive_below": 1.0},
            {"learning_rate": 0.003},
            10_000,
            ["--lr 0.001 (now 0.003)"],
            ["--set", "--batch-size"],
        ),
    }.values(),
    ids=["settings", "a-limit-that-cannot-act", "small-batch", "few-images", "high-rate"],
)
def test_advice_is_of_the_settings_at_hand(
    model: dict[str, Any], train: dict[str, Any], images: int, said: list[str], unsaid: list[str]
) -> None:
    plain = {"codebook_init": "normal", "revive_below": 0.0, "in_channels": 3}
    config = train_config(**{"batch_size": 32, "learning_rate": 3e-4, "accumulate": 1, **train})
    training = CodebookTraining(VQVAEConfig(**{**plain, **model}), config, images, (64, 64))
    found = few_codes([collapsed(0)], training, "validation")
    assert found is not None
    for words in said:
        assert words in found
    for words in unsaid:
        assert words not in found


def test_only_levels_with_few_codes_are_named() -> None:
    healthy = CodeUse(0, 2, 512, used=400, perplexity=300.0, vectors=4000)
    assert few_codes([healthy], None, "training") is None
    found = few_codes([healthy, collapsed(1)], None, "training")
    assert found is not None
    assert "level 1 (bottom): 1 of 512" in found
    assert "level 0" not in found


def test_what_codes_depend_on_is_read_from_the_run(tmp_path: Path) -> None:
    config = train_config(steps=2, validation_fraction=0.3)
    stage1(tmp_path, config)
    found = CodebookTraining.of_run(tmp_path)
    assert found == CodebookTraining(VQVAE_CONFIG, config, 22, (8, 8))
    assert (found.validated, found.grids) == (7, [4, 16])


# ---- When a run validates


def test_validation_every_few_steps_survives_a_kill(tmp_path: Path) -> None:
    config = train_config(validate_every=3)
    stage1(tmp_path / "whole", config)
    assert [line["step"] for line in metrics(tmp_path / "whole", "validation")] == [3, 6, 9, 12, 13]
    for step in (6, 7):

        def die(step: int = step) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "gradients", before(loop.gradients, step, kill_myself))
                stage1(tmp_path / str(step), config)

        dies_by_sigkill(die)
        stage1(tmp_path / str(step), config, resume=True)
        assert state_tensors(tmp_path / str(step)) == state_tensors(tmp_path / "whole")
        assert files(tmp_path / str(step) / "best") == files(tmp_path / "whole" / "best")


def test_how_often_a_run_validates_changes_no_weights_and_may_change(tmp_path: Path) -> None:
    config = train_config(steps=8)
    stage1(tmp_path / "epochs", config)
    stage1(tmp_path / "steps", dataclasses.replace(config, validate_every=1))
    weights = "model/model.safetensors"
    assert files(tmp_path / "steps")[weights] == files(tmp_path / "epochs")[weights]

    def die() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "gradients", before(loop.gradients, 5, kill_myself))
            stage1(tmp_path / "changed", config)

    dies_by_sigkill(die)
    stage1(tmp_path / "changed", dataclasses.replace(config, validate_every=1), resume=True)
    assert files(tmp_path / "changed")[weights] == files(tmp_path / "epochs")[weights]
    # The checkpoint is of step 4, whose validation is made up for where it was not due before.
    assert [line["step"] for line in metrics(tmp_path / "changed", "validation")] == [3, 4, 5, 6, 7, 8]


# ---- Pictures


def picture_of(dataset: Noise, validation: np.ndarray) -> Picture:
    task = _Reconstruction(dataset, np.arange(10), validation, VQVAE_CONFIG, train_config(), None)
    with torch.no_grad():
        return task.picture(build(VQVAE_CONFIG).eval(), torch.device("cpu"), 1)


def test_reconstructions_are_of_all_classes_with_their_names() -> None:
    dataset = Noise(200)
    dataset.labels = torch.arange(200) // 70  # classes lie one after the other, as in folders
    validation = np.arange(20, 200)
    found = picture_of(dataset, validation)
    assert found.captions == ["a"] * 4 + ["b"] * 3 + ["c"] * 3
    assert found.columns == 10
    assert found.images.shape == (20, 1, 8, 8)
    assert torch.equal(found.images[:4], dataset.pixels[[20, 32, 45, 57]])


def test_reconstructions_without_classes_are_spread_over_the_data() -> None:
    dataset = Noise(120)
    dataset.labels = None
    found = picture_of(dataset, np.arange(20, 120))
    assert found.captions is None
    assert torch.equal(found.images[:10], dataset.pixels[20:120:10])


def test_a_prior_may_show_a_grid_with_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int | None, Any]] = []

    def keep(path: Path, images: Any, columns: int | None, *, captions: Any, overwrite: bool) -> None:
        calls.append((columns, captions))

    monkeypatch.setattr(loop, "save_grid", keep)
    codes, images = make_codes(tmp_path / "codes"), torch.zeros(4, 1, 8, 8)
    stage2(codes, tmp_path / "1", train_config(steps=2), sample_images=lambda prior, step: images)
    grid = Picture("samples", images, 2, ["a", "b"])
    stage2(codes, tmp_path / "2", train_config(steps=2), sample_images=lambda prior, step: grid)
    assert calls == [(None, None), (2, ["a", "b"])]
