"""Resumption: exact after a kill at any point; the run folder is never overwritten or mixed up."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import (
    VQVAE_CONFIG,
    Noise,
    before,
    dies_by_sigkill,
    files,
    kill_myself,
    metrics,
    stage1,
    stage2,
    state_tensors,
    train_config,
)

from fastvq.data import Augment
from fastvq.errors import (
    CorruptFileError,
    FileConflictError,
    MissingFileError,
    Terminated,
)
from fastvq.models import VQVAE2, Prior
from fastvq.training import TrainConfig, WeightAverage, train_vqvae
from fastvq.training import checkpoint as checkpoint_module
from fastvq.training import loop as loop_module
from fastvq.training.batches import StepBatches

Train = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Resumption


def kill_at_step(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(StepBatches, "__getitem__", before(StepBatches.__getitem__, step, kill_myself))


def kill_in_update(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(WeightAverage, "update", before(WeightAverage.update, step, kill_myself))


def kill_in_checkpoint(name: str, call: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(
        checkpoint_module, name, before(getattr(checkpoint_module, name), call, kill_myself)
    )


def kill_before_rename(patch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def guarded(source: Any, target: Any) -> None:
        if Path(target).name == "step_00000008":
            kill_myself()
        replace(source, target)

    patch.setattr(os, "replace", guarded)


def kill_in_pruning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint_module.shutil, "rmtree", before(checkpoint_module.shutil.rmtree, 1, kill_myself))


def kill_before_model_is_saved(patch: pytest.MonkeyPatch) -> None:
    for kind in (VQVAE2, Prior):
        patch.setattr(kind, "save_pretrained", before(kind.save_pretrained, 0, kill_myself))


KILLS = {
    "before the first checkpoint": kill_at_step(2),
    "right after a checkpoint": kill_at_step(4),
    "between checkpoints, mid-epoch": kill_at_step(6),
    "at an epoch boundary": kill_at_step(10),
    "inside a step": kill_in_update(9),
    "in a checkpoint, before its tensors": kill_in_checkpoint("save_tensors", 1),
    "in a checkpoint, before its description": kill_in_checkpoint("write_json", 1),
    "in a checkpoint, before the rename": kill_before_rename,
    "while old checkpoints are removed": kill_in_pruning,
    "after the last step": kill_before_model_is_saved,
}


@pytest.fixture(scope="module")
def uninterrupted(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    stage1(folder / "stage1")
    stage2(codes, folder / "stage2")
    return {"stage1": folder / "stage1", "stage2": folder / "stage2"}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_resume_after_sigkill_is_bit_identical(
    stage: str,
    kill: Callable[[pytest.MonkeyPatch], None],
    uninterrupted: dict[str, Path],
    codes: Path,
    tmp_path: Path,
) -> None:
    def run(**options: Any) -> Any:
        return stage1(tmp_path, **options) if stage == "stage1" else stage2(codes, tmp_path, **options)

    def run_and_die() -> None:
        with pytest.MonkeyPatch.context() as patch:
            kill(patch)
            run()

    dies_by_sigkill(run_and_die)
    assert not (tmp_path / "model").exists()
    model = run(resume=True)

    assert state_tensors(tmp_path) == state_tensors(uninterrupted[stage])
    assert not list(tmp_path.rglob("*.tmp"))
    expected = load_file(uninterrupted[stage] / "model" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_resume_twice_and_with_other_neutral_settings(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    def die(step: int, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            kill_at_step(step)(patch)
            stage1(tmp_path, **options)

    dies_by_sigkill(lambda: die(5))
    dies_by_sigkill(lambda: die(5, config=train_config(checkpoint_every=1), resume=True))
    stage1(tmp_path, train_config(image_every=2, keep_checkpoints=1), resume=True)
    name = "model/model.safetensors"
    assert files(tmp_path)[name] == files(uninterrupted["stage1"])[name]
    assert files(tmp_path)["logs/metrics.jsonl"] == files(uninterrupted["stage1"])["logs/metrics.jsonl"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000013"]


def test_sigkill_from_outside(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    script = """
import sys, time
sys.path[:0] = ["tests", "tests/training"]
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
from training_helpers import Noise, stage1
class Slow(Noise):
    def image(self, index):
        time.sleep(0.03)
        return super().image(index)
stage1(sys.argv[1], dataset=Slow())
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "step_00000004").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stage1(tmp_path, resume=True)
    assert state_tensors(tmp_path) == state_tensors(uninterrupted["stage1"])


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["Ctrl-C", "SIGTERM"]
)
def test_interrupt_ends_after_the_step_with_a_checkpoint(
    number: int, kind: type[BaseException], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        update = before(WeightAverage.update, 5, lambda: signal.raise_signal(number))
        patch.setattr(WeightAverage, "update", update)
        with pytest.raises(KeyboardInterrupt) as caught:
            train(tmp_path / "interrupted")
    assert caught.type is kind
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint_module.checkpoints(tmp_path / "interrupted" / "checkpoints")[-1].name == "step_00000006"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tmp_path / "interrupted", resume=True)
    train(tmp_path / "whole")
    name = "model/model.safetensors"
    assert files(tmp_path / "interrupted")[name] == files(tmp_path / "whole")[name]
    assert metrics(tmp_path / "interrupted") == metrics(tmp_path / "whole")


def test_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(WeightAverage, "update", before(WeightAverage.update, 5, twice))
    with pytest.raises(KeyboardInterrupt):
        stage1(tmp_path)
    assert checkpoint_module.checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000004"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Vanishing(Noise):
    """An image that cannot be read from some call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def image(self, index: int) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise CorruptFileError("photos/7.png: No such file or directory")
        return super().image(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_break_leave_the_finished_steps(workers: int, tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    config = train_config(checkpoint_every=None, num_workers=workers)
    # Seven batches of eight images and two validations of two.
    with pytest.raises(CorruptFileError, match=r"photos/7.png: No such file") as caught:
        stage1(tmp_path, config, dataset=Vanishing(56 + (4 if workers == 0 else 0)))
    newest = checkpoint_module.checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == "step_00000007"
    assert f"The 7 finished steps are in {newest}" in caught.value.__notes__[0]
    stage1(tmp_path, resume=True)
    name = "model/model.safetensors"
    assert files(tmp_path)[name] == files(uninterrupted["stage1"])[name]
    assert metrics(tmp_path) == metrics(uninterrupted["stage1"])


def test_runs_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=stage1, args=(tmp_path, train_config(steps=2)))
    thread.start()
    thread.join()
    assert (tmp_path / "model").is_dir()


def test_finished_run_returns_its_model(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(tmp_path)
    before_resume = files(tmp_path)
    monkeypatch.setattr(loop_module, "_steps", None)
    again = train(tmp_path, resume=True)
    assert not again.training
    assert files(tmp_path) == before_resume
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_damaged_log_tail_is_cut(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    dies_by_sigkill(lambda: _die_at(tmp_path, 7))
    log = tmp_path / "logs" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 7, "spl')
    stage1(tmp_path, resume=True)
    assert log.read_bytes() == files(uninterrupted["stage1"])["logs/metrics.jsonl"]


def _die_at(run_dir: Path, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(step)(patch)
        stage1(run_dir)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_checkpoint_is_refused(name: str, damage: str, tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    dies_by_sigkill(lambda: _die_at(tmp_path, 10))
    newest = tmp_path / "checkpoints" / "step_00000008"
    path = newest / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2 if name.endswith("safetensors") else 0] ^= 0xFF
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    with pytest.raises(CorruptFileError, match="newest checkpoint is damaged") as caught:
        stage1(tmp_path, resume=True)
    assert str(path) in str(caught.value)
    assert f"step_00000004, remove the folder {newest}" in str(caught.value)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    stage1(tmp_path, resume=True)
    assert state_tensors(tmp_path) == state_tensors(uninterrupted["stage1"])


def test_only_checkpoint_damaged(tmp_path: Path) -> None:
    dies_by_sigkill(lambda: _die_at(tmp_path, 5))
    (tmp_path / "checkpoints" / "step_00000004" / "state.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="no older checkpoint"):
        stage1(tmp_path, resume=True)


def test_checkpoints_hold_no_pickle(uninterrupted: dict[str, Path]) -> None:
    folder = uninterrupted["stage1"] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000012", "step_00000013"]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


# ---- The run folder


def test_new_run_needs_an_empty_folder(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileConflictError, match="not empty; choose another folder"):
        train(tmp_path)
    assert files(tmp_path) == {"mine.txt": b"keep"}
    with pytest.raises(FileConflictError, match="is a file"):
        train(tmp_path / "mine.txt")
    with pytest.raises(FileConflictError, match="is a file"):
        train(tmp_path / "mine.txt", resume=True)


def test_existing_run_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    train(tmp_path, train_config(steps=2))
    contents = files(tmp_path)
    with pytest.raises(FileConflictError, match="resume it"):
        train(tmp_path, train_config(steps=2))
    assert files(tmp_path) == contents


def test_nothing_to_resume(train: Train, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(MissingFileError, match="nothing to resume"):
            train(folder, resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_clip": 2.0}, r"train.grad_clip: 1.0 there, 2.0 now"),
        ({"learning_rate": 0.5, "seed": 1}, r"(?s)learning_rate.*seed"),
    ],
)
def test_resume_with_other_settings(changes: dict[str, Any], message: str, train: Train, tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(FileConflictError, match=message):
        train(tmp_path, train_config(**changes), resume=True)


def test_resume_with_other_data_or_model(tmp_path: Path) -> None:
    stage1(tmp_path)
    with pytest.raises(FileConflictError, match=r"data.fingerprint: 'noise-22-0' there, 'noise-22-1' now"):
        stage1(tmp_path, dataset=Noise(seed=1), resume=True)
    with pytest.raises(FileConflictError, match=r"data.augment"):
        stage1(tmp_path, augment=None, resume=True)
    other = dataclasses.replace(VQVAE_CONFIG, num_codes=9)
    with pytest.raises(FileConflictError, match=r"model.num_codes: 8 there, 9 now"):
        train_vqvae(Noise(), other, train_config(), tmp_path, augment=Augment(1, True), resume=True)


def test_config_file(tmp_path: Path) -> None:
    config = train_config(steps=2)
    stage1(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["stage"] == 1
    assert TrainConfig.from_dict(stored["train"]) == config
    assert stored["model"]["class"] == "VQVAE2"
    assert stored["versions"]["torch"] == torch.__version__
