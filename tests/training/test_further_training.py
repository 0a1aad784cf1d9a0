"""Runs that get longer or shorter, start from trained weights, keep their best, and are used before they end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    TOP_CONFIG,
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

from fastvq._files import sealed
from fastvq.cli import main
from fastvq.errors import ArgumentError, FileConflictError, MissingFileError
from fastvq.models import build, load_pretrained
from fastvq.training import learning_rate, load_weights, train_vqvae
from fastvq.training.batches import StepBatches

pytestmark = pytest.mark.usefixtures("steady")


def die_at(run_dir: Path, step: int, **options: Any) -> None:
    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepBatches, "__getitem__", before(StepBatches.__getitem__, step, kill_myself))
            stage1(run_dir, **options)

    dies_by_sigkill(run)


def steps_of(run: Path) -> Any:
    return json.loads((run / "config.json").read_text())["train"]["steps"]


# ---- Longer and shorter


def test_a_finished_run_goes_on_with_the_rates_of_the_longer_one(tmp_path: Path) -> None:
    stage1(tmp_path)
    first = files(tmp_path)["model/model.safetensors"]
    longer = train_config(steps=20)
    stage1(tmp_path, longer, resume=True)
    assert files(tmp_path)["model/model.safetensors"] != first
    assert steps_of(tmp_path) == 20
    rates = {line["step"]: line["learning_rate"] for line in metrics(tmp_path, "train")}
    assert {step: rates[step] for step in (15, 18, 20)} == {s: learning_rate(s - 1, longer) for s in (15, 18, 20)}
    assert rates[13] == learning_rate(12, train_config())
    after = files(tmp_path)
    stage1(tmp_path, longer, resume=True)
    assert files(tmp_path) == after
    assert "model_steps" not in json.loads((tmp_path / "config.json").read_text())


def test_longer_training_survives_a_kill_and_keeps_the_model_until_then(tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        stage1(tmp_path / name)
    first = files(tmp_path / "killed" / "model")
    longer = train_config(steps=20)
    die_at(tmp_path / "killed", 5, config=longer, resume=True)
    assert files(tmp_path / "killed" / "model") == first
    stage1(tmp_path / "killed", longer, resume=True)
    stage1(tmp_path / "whole", longer, resume=True)
    assert state_tensors(tmp_path / "killed") == state_tensors(tmp_path / "whole")


@pytest.mark.parametrize("steps", [2, 8])
def test_an_interrupted_run_is_finished_as_it_is(steps: int, tmp_path: Path) -> None:
    die_at(tmp_path, 10)
    model = stage1(tmp_path, train_config(steps=steps), resume=True)
    assert steps_of(tmp_path) == 8
    state = load_weights(tmp_path / "checkpoints" / "step_00000008").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    last = metrics(tmp_path)[-2:]
    assert {(line["step"], line["split"]) for line in last} == {(8, "train"), (8, "validation")}
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["reconstructions_00000008.png"]
    stage1(tmp_path, train_config(), resume=True)
    assert steps_of(tmp_path) == 13


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tmp_path: Path) -> None:
    stage1(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    contents = files(tmp_path)
    with pytest.raises(MissingFileError, match=r"no checkpoint to go on from.*init_from"):
        stage1(tmp_path, train_config(steps=20), resume=True)
    assert files(tmp_path) == contents


# ---- Starting from trained weights


@pytest.mark.parametrize("source", ["model", "run", "checkpoint", "unfinished run"])
def test_a_new_run_starts_from_weights(source: str, tmp_path: Path) -> None:
    run = tmp_path / "first"
    die_at(run, 5) if source == "unfinished run" else stage1(run)
    folder = {"model": run / "model", "checkpoint": run / "checkpoints" / "step_00000012"}.get(source, run)
    start = load_weights(folder).state_dict()
    config = train_config(steps=2, learning_rate=1e-30, weight_decay=0.0)
    found = stage1(tmp_path / "second", config, init_from=folder).state_dict()
    for name, parameter in build(VQVAE_CONFIG).named_parameters():
        assert torch.equal(found[name], start[name]), name
        assert parameter.shape == found[name].shape
    assert json.loads((tmp_path / "second" / "config.json").read_text())["init"]["from"] == str(folder)


def test_a_run_from_weights_that_is_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    stage1(tmp_path / "first")
    for name in ("killed", "whole"):
        folder = tmp_path / name
        if name == "killed":
            die_at(folder, 2, init_from=tmp_path / "first")
            stage1(folder, resume=True)
        else:
            stage1(folder, init_from=tmp_path / "first")
    assert state_tensors(tmp_path / "killed") == state_tensors(tmp_path / "whole")
    with pytest.raises(FileConflictError, match=r"init_from: .*first.* there, .*whole"):
        stage1(tmp_path / "killed", resume=True, init_from=tmp_path / "whole")


def test_weights_that_changed_before_the_first_checkpoint(tmp_path: Path) -> None:
    stage1(tmp_path / "first")
    die_at(tmp_path / "second", 2, init_from=tmp_path / "first")
    stage1(tmp_path / "first", train_config(steps=20), resume=True)
    with pytest.raises(FileConflictError, match=r"init_from: the weights in .*first have changed since"):
        stage1(tmp_path / "second", resume=True)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    codes = make_codes(tmp_path / "codes")
    stage1(tmp_path / "first", train_config(steps=2))
    other = dataclasses.replace(VQVAE_CONFIG, channels=16)
    run = tmp_path / "second"
    with pytest.raises(ArgumentError, match=r"do not fit.*is \[.*there, \[.*here.*channels = 8 there, 16 here"):
        train_vqvae(Noise(), other, train_config(steps=2), run, init_from=tmp_path / "first")
    with pytest.raises(ArgumentError, match="holds a VQVAE2, the new model is a PixelSNAIL"):
        stage2(codes, run, train_config(steps=2), init_from=tmp_path / "first")
    with pytest.raises(MissingFileError):
        stage1(run, init_from=tmp_path / "nowhere")
    assert not run.exists()
    assert TOP_CONFIG.channels == 8


# ---- The best weights


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_best_validation_is_kept(stage: str, tmp_path: Path) -> None:
    config = train_config(learning_rate=0.3, grad_clip=None, ema_decay=None)  # unsteady on purpose
    run = tmp_path / "run"
    stage1(run, config) if stage == "stage1" else stage2(make_codes(tmp_path / "codes"), run, config)
    metric = "mse" if stage == "stage1" else "nll"
    found = {line["step"]: line[metric] for line in metrics(run, "validation")}
    best = min(found, key=lambda step: found[step])
    stored = json.loads((run / "best" / "validation.json").read_text())
    assert stored == sealed({"step": best, "metric": metric, "value": found[best]})
    assert stage == "stage2" or len(set(found.values())) > 1
    newest = load_weights(run, weights="best").state_dict()
    kept = load_pretrained(run / "best").state_dict()
    assert all(torch.equal(newest[name], kept[name]) for name in kept)


@pytest.mark.parametrize("step", [4, 6, 9, 12])
def test_the_best_outlives_a_kill(step: int, tmp_path: Path) -> None:
    stage1(tmp_path / "whole")
    die_at(tmp_path / "killed", step)
    stage1(tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed" / "best") == files(tmp_path / "whole" / "best")


def test_no_best_without_validation(tmp_path: Path) -> None:
    stage1(tmp_path, train_config(steps=2, validation_fraction=0.0))
    assert not (tmp_path / "best").exists()
    with pytest.raises(MissingFileError, match="no best weights"):
        load_weights(tmp_path, weights="best")


# ---- The command line


SETTINGS = ["--steps", "4", "--batch-size", "4", "--quiet", "--image-every", "2", "--checkpoint-every", "2"]
DIGITS = ["--data", "digits", "--size", "8", "--preset", "tiny", "--set", "in_channels=1", "--set", "channels=8"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, codes and both priors, the second one killed after 2 of 4 steps."""
    run = tmp_path_factory.mktemp("project") / "my"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process cannot use OpenMP's other threads
    assert main(["train-vqvae", "--run", str(run), *DIGITS, *SETTINGS, "--validation", "0.01"]) == 0
    assert main(["extract", "--run", str(run), "--quiet"]) == 0
    assert main(["train-prior", "--run", str(run), "--level", "0", "--preset", "tiny-top", *SETTINGS]) == 0

    def die() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepBatches, "__getitem__", before(StepBatches.__getitem__, 3, kill_myself))
            main(["train-prior", "--run", str(run), "--level", "1", "--preset", "tiny-bottom", *SETTINGS])

    dies_by_sigkill(die)
    torch.set_num_threads(threads)
    return run


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "my"))


def test_resume_needs_no_other_option(copy: Path) -> None:
    command = ["train-prior", "--run", str(copy), "--level", "1", "--resume"]
    assert main([*command, "--quiet"]) == 0
    assert steps_of(copy / "prior1") == 4
    assert main(["train-vqvae", "--run", str(copy), "--resume", "--quiet"]) == 0
    assert main([*command, "--steps", "6", "--quiet"]) == 0
    assert steps_of(copy / "prior1") == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0.5"], "--lr: the run in"),
        (["--batch-size", "5"], "--batch-size"),
        (["--ema", "0"], "--ema: the run in"),
        (["--set", "channels=9"], "--set channels: the run in"),
        (["--preset", "digits"], "--preset (channels)"),
        (["--channels", "3"], "--channels: the run in"),
        (["--seed", "1"], "--seed"),
        (["--bf16"], "--bf16: the run in"),
        (["--shift", "1"], "shift: 0 there, 1 now"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_differ_are_refused_by_name(
    options: list[str], message: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = files(copy)
    assert main(["train-vqvae", "--run", str(copy), "--resume", "--quiet", *options]) == 1
    assert message in capsys.readouterr().err
    assert files(copy) == contents


@pytest.mark.parametrize(
    "options",
    [
        DIGITS,
        ["--preset", "tiny"],
        ["--set", "channels=8"],
        ["--batch-size", "4"],
        ["--workers", "1"],
        ["--ema", "0.999"],
    ],
    ids=" ".join,
)
def test_options_that_agree_are_fine(options: list[str], copy: Path) -> None:
    assert main(["train-vqvae", "--run", str(copy), "--resume", "--quiet", *options]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train-vqvae", "--data", "digits", "--preset", "tiny"], "--steps: a new run needs"),
        (["train-vqvae", "--preset", "digits", "--steps", "1"], "--data: a new run needs"),
        (["train-vqvae", "--resume"], "--resume: nothing to resume"),
        (["train-classifier", "--data", "digits"], "--steps: a new run needs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_a_new_run_needs(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([options[0], "--run", str(tmp_path / "my"), "--quiet", *options[1:]]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "my").exists()


def test_unfinished_stages_are_used_and_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = copy.parent / "a.png"
    assert main(["sample", "--checkpoint", str(copy), "-n", "2", "--seed", "0", "--quiet", "--out", str(out)]) == 0
    assert f"note: {copy / 'prior1'} is unfinished, step 2 of 4" in capsys.readouterr().err
    assert out.is_file()
    assert main(["info", "--checkpoint", str(copy)]) == 0
    text = capsys.readouterr().out
    assert "vqvae       finished, 4 steps; best validation mse" in text
    assert "prior0      finished, 4 steps" in text
    assert "prior1      unfinished, step 2 of 4" in text
    for folder in ("prior1", "prior1/checkpoints/step_00000002", "vqvae/best"):
        assert main(["info", "--checkpoint", str(copy / folder)]) == 0
        assert "million parameters" in capsys.readouterr().out
    shutil.rmtree(copy / "prior1")
    assert main(["info", "--checkpoint", str(copy)]) == 0
    assert "prior1      has not begun" in capsys.readouterr().out
    assert main(["sample", "--checkpoint", str(copy), "-n", "2", "--out", str(copy.parent / "b.png")]) == 1
    assert "prior1 has not begun; run `fastvq train-prior --run" in capsys.readouterr().err


def test_best_weights_of_the_priors(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "--checkpoint", str(copy), "-n", "2", "--seed", "0", "--quiet", "--weights", "best"]
    assert main([*command, "--out", str(copy.parent / "a.png")]) == 1
    assert "prior1 holds no best weights" in capsys.readouterr().err
    assert main(["train-prior", "--run", str(copy), "--level", "1", "--resume", "--quiet"]) == 0
    shutil.rmtree(copy / "prior0" / "model")
    shutil.copytree(copy / "prior0" / "best", copy / "prior0" / "model")
    shutil.rmtree(copy / "prior1" / "model")
    shutil.copytree(copy / "prior1" / "best", copy / "prior1" / "model")
    assert main([*command, "--out", str(copy.parent / "a.png")]) == 0
    assert main([*command[:-1], "last", "--out", str(copy.parent / "b.png")]) == 0
    assert (copy.parent / "a.png").read_bytes() == (copy.parent / "b.png").read_bytes()


def test_priors_of_an_autoencoder_that_was_trained_further(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-vqvae", "--run", str(copy), "--resume", "--steps", "6", "--quiet"]) == 0
    assert main(["sample", "--checkpoint", str(copy), "-n", "2", "--out", str(copy.parent / "b.png")]) == 1
    assert "belongs to another autoencoder" in capsys.readouterr().err


def test_init_from_on_the_command_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy.parent / "new"
    command = ["train-vqvae", "--run", str(run), "--data", "digits", "--size", "8", *SETTINGS]
    assert main([*command, "--init-from", str(copy / "vqvae"), "--set", "channels=16"]) == 1
    assert "channels = 8 there, 16 here" in capsys.readouterr().err
    assert not run.exists()
    assert main([*command, "--init-from", str(copy / "vqvae")]) == 0
    assert load_pretrained(run / "vqvae" / "model").config == load_pretrained(copy / "vqvae" / "model").config
    prior = ["train-prior", "--run", str(copy), "--level", "0", *SETTINGS, "--init-from", str(copy / "prior1")]
    shutil.rmtree(copy / "prior0")
    assert main(prior) == 1
    assert "do not fit the new model" in capsys.readouterr().err


def test_a_classifier_goes_on_from_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-classifier", "--run", str(tmp_path)]
    start = ["--data", "digits", "--size", "8", "--set", "channels=(4,)", "--set", "features=4", "--shift", "1"]
    assert main([*command, *start, "--steps", "2", "--batch-size", "4", "--quiet"]) == 0
    assert main([*command, "--resume", "--steps", "4", "--quiet"]) == 0
    assert steps_of(tmp_path / "classifier") == 4
    capsys.readouterr()
    assert main([*command, "--resume", "--shift", "2", "--quiet"]) == 1
    assert "data.augment" in capsys.readouterr().err
