"""Damaged files of runs, projects and evaluations, and a short run of what changes files at random."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_loaders
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import stage1, train_config

from fastvq._files import SEAL, read_json, sealed
from fastvq.cli.project import Project
from fastvq.errors import CorruptFileError
from fastvq.evaluation import statistics
from fastvq.training.checkpoint import checkpoints
from fastvq.training.log import MetricLog, last_validation
from fastvq.training.weights import best_validation, load_weights

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and without a model."""
    run = tmp_path_factory.mktemp("run")
    stage1(run, train_config(steps=2))
    shutil.rmtree(run / "model")
    return run


def rewrite(path: Path, seal: bool, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(sealed(content) if seal else content))


STATE: dict[str, tuple[dict[str, Any], str]] = {
    "step-text": ({"step": "2"}, 'missing or wrong entry: step is "2", expected an integer from 0'),
    "step-of-another": ({"step": 1}, "step 1, but the folder is step_00000002"),
    "totals-list": ({"totals": [1]}, r"missing or wrong entry: totals is \[1\], expected an object"),
    "totals-text": ({"totals": {"loss": "x"}}, "missing or wrong entry: totals is"),
    "steps-negative": ({"totals_steps": -1}, "missing or wrong entry: totals_steps is -1"),
    "optimizer-list": ({"optimizer": []}, r"missing or wrong entry: optimizer is \[\], expected an object"),
    "groups-none": ({"optimizer": {"param_groups": []}}, r"missing or wrong entry: param_groups is \[\]"),
    "groups-empty": ({"optimizer": {"param_groups": [{}]}}, "does not fit this run"),
    "groups-two": ({"optimizer": {"param_groups": [{"betas": [0, 0]}, {"betas": [0, 0]}]}}, "does not fit this run"),
    "betas-number": ({"optimizer": {"param_groups": [{"betas": 3}]}}, "does not fit this run"),
    "sha256-number": ({"sha256": 3}, "missing or wrong entry: sha256 is 3, expected text"),
}


@pytest.mark.parametrize(("changes", "message"), STATE.values(), ids=STATE.keys())
def test_wrong_entries_of_a_checkpoint(
    changes: dict[str, Any], message: str, interrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    newest = checkpoints(run / "checkpoints")[-1]
    rewrite(newest / "state.json", True, **changes)
    with pytest.raises(CorruptFileError, match=rf"newest checkpoint is damaged: .*{newest.name}.*: {message}"):
        stage1(run, train_config(steps=2), resume=True)


def test_a_changed_entry_of_a_checkpoint_is_found(interrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    path = checkpoints(run / "checkpoints")[-1] / "state.json"
    text = path.read_text()
    assert '"weight_decay": 0.0,' in text
    path.write_text(text.replace('"weight_decay": 0.0,', '"weight_decay": 0.1,'))
    with pytest.raises(CorruptFileError, match="state.json: its entries do not fit the checksum among them"):
        stage1(run, train_config(steps=2), resume=True)
    content = json.loads(text)
    del content[SEAL]
    path.write_text(json.dumps(content))
    assert not stage1(run, train_config(steps=2), resume=True).training


RECORD: dict[str, tuple[dict[str, Any], str]] = {
    "no-model": ({"model": None}, "config.json: missing or wrong entry: model is null, expected an object"),
    "no-train": ({"train": []}, r"config.json: missing or wrong entry: train is \[\], expected an object"),
    "steps-text": ({"train": {"steps": "2"}}, 'config.json: missing or wrong entry: steps is "2", expected an integer'),
    "other-class": ({"model": {"class": "Other"}}, r"does not fit the run it lies in \(class: expected one of"),
    "other-field": ({"model": {"class": "VQVAE2", "other": 3}}, "does not fit the run it lies in"),
    "init": ({"init": {"from": "x"}}, "config.json: missing or wrong entry: no weights, expected text"),
    "notes": ({"notes": 3}, "config.json: missing or wrong entry: notes is 3, expected an object"),
}


@pytest.mark.parametrize(("changes", "message"), RECORD.values(), ids=RECORD.keys())
def test_wrong_entries_of_the_record_of_a_run(
    changes: dict[str, Any], message: str, interrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    rewrite(run / "config.json", False, **changes)
    with pytest.raises(CorruptFileError, match=message):
        load_weights(run)


def test_a_changed_checkpoint_of_an_unfinished_run(interrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    newest = checkpoints(run / "checkpoints")[-1]
    flip(newest / "state.safetensors")
    with pytest.raises(CorruptFileError, match="state.safetensors: checksum differs from the one in state.json"):
        load_weights(run)
    newest.rename(run / "checkpoints" / "step_00000003")
    with pytest.raises(CorruptFileError, match="state.json: step 2, but the folder is step_00000003"):
        load_weights(run)


@pytest.mark.parametrize(
    ("seal", "changes", "message"),
    [
        (False, {"value": 0.0}, "its entries do not fit the checksum among them"),
        (True, {"value": "low"}, 'missing or wrong entry: value is "low", expected a number'),
        (True, {"step": -1}, "missing or wrong entry: step is -1"),
    ],
    ids=["changed", "text", "negative"],
)
def test_a_damaged_note_of_the_best_validation(
    seal: bool, changes: dict[str, Any], message: str, interrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    assert best_validation(run) is not None
    path = run / "best" / "validation.json"
    content = json.loads(path.read_text())
    rewrite(path, False, **sealed({**content, **changes}) if seal else changes)
    with pytest.raises(CorruptFileError, match=f"validation.json: {message}"):
        best_validation(run)


DATA: dict[str, Any] = {
    "data": "digits",
    "size": [32, 32],
    "channels": 1,
    "class_names": ["0"],
    "skip_broken": False,
    "flip": False,
    "shift": 2,
    "validation": 0.1,
    "seed": 0,
}
WRONG_DATA = {
    "data": 3, "size": [32], "channels": 0, "class_names": "abc", "skip_broken": 1, "flip": None, "shift": -1,
    "validation": 1.5, "seed": 2**70,
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_wrong_entries_of_a_project(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(DATA))
    assert Project(tmp_path).read_data() == DATA
    path.write_text(json.dumps({**DATA, name: WRONG_DATA[name]}))
    with pytest.raises(CorruptFileError, match=f"data.json: missing or wrong entry: {name} is .*, expected"):
        Project(tmp_path).read_data()
    path.write_text(json.dumps({key: value for key, value in DATA.items() if key != name}))
    with pytest.raises(CorruptFileError, match=f"data.json: missing or wrong entry: no {name}, expected"):
        Project(tmp_path).read_data()


GOOD_LINES = ['{"step": 1, "split": "train", "loss": 0.5}', '{"step": 1, "split": "validation", "mse": 0.25}']
BAD_LINES: dict[str, str] = {
    "cut-short": '{"step": 2, "spl',
    "list": "[2]",
    "no-step": '{"split": "train"}',
    "step-text": '{"step": "2", "split": "train"}',
    "step-nan": '{"step": NaN, "split": "train"}',
    "no-split": '{"step": 2}',
    "nested": "[" * 100_000,
    "huge-integer": '{"step": ' + "9" * 10_000 + ', "split": "train"}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_damaged_lines_of_a_log(line: str, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join([*GOOD_LINES, line, GOOD_LINES[0], ""]))
    with pytest.raises(CorruptFileError, match=r"metrics.jsonl: not a log of metrics \(line 3 is damaged\)"):
        last_validation(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MetricLog(tmp_path / "logs", 5).__exit__(None, None, None)
    assert path.read_text().splitlines() == GOOD_LINES
    assert last_validation(tmp_path, "mse") == {"step": 1, "split": "validation", "mse": 0.25}
    with pytest.raises(CorruptFileError, match="metrics.jsonl: missing or wrong entry: no psnr, expected a number"):
        last_validation(tmp_path, "mse", "psnr")


def without_checksum(path: Path, change: Callable[[dict[str, torch.Tensor]], object], **entries: str) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "1", "count": "12", "keep": "10000", "seed": "0", **entries})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


CACHES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped-bit": (flip, "its contents do not fit the checksum among them"),
    "no-mean": (lambda path: without_checksum(path, lambda t: t.pop("mean")), "'mean'"),
    "mean-of-another-size": (
        lambda path: without_checksum(path, lambda t: t.update(mean=torch.zeros(4, dtype=torch.float64))),
        r"mean is torch.float64 of shape \[4\]",
    ),
    "vectors-of-another-type": (
        lambda path: without_checksum(path, lambda t: t.update(vectors=t["vectors"].half())),
        "vectors is torch.float16",
    ),
    "count-text": (lambda path: without_checksum(path, dict, count="many"), "invalid literal"),
    "keep-negative": (lambda path: without_checksum(path, dict, keep="-1"), "vectors is|keep: must be"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), ""),
    "empty": (lambda path: path.write_bytes(b""), ""),
}


@pytest.mark.parametrize(("damage", "message"), CACHES.values(), ids=CACHES.keys())
def test_damaged_statistics(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    fuzz_loaders.make_statistics(tmp_path)
    path = tmp_path / "features.safetensors"
    expected = statistics._load(path)
    damage(path)
    with pytest.raises(CorruptFileError, match=rf"features.safetensors: not a (whole safetensors )?file.*{message}"):
        statistics._load(path)
    fuzz_loaders.make_statistics(tmp_path)
    without_checksum(path, dict)
    assert torch.equal(statistics._load(path).vectors, expected.vectors)
    assert np.array_equal(statistics._load(path)._words, expected._words)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}", b"\xff", b"", b"3"])
def test_files_that_are_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"a.json: (not valid JSON|expected a JSON object)"):
        read_json(tmp_path / "a.json")


def test_files_changed_at_random(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        faults = list(fuzz_loaders.run(340, 0, tmp_path))
    assert faults == []
    for loader in fuzz_loaders.LOADERS:
        assert sum(loader.counts.values()) == 20
        assert loader.counts["refused"] > 0, loader.name


def test_a_fault_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Path) -> object:
        return json.loads((folder / "a.json").read_bytes())

    careless = fuzz_loaders.Loader("careless", fuzz_loaders.make_json, load)
    monkeypatch.setattr(fuzz_loaders, "LOADERS", [careless])
    faults = list(fuzz_loaders.run(40, 0, tmp_path))
    assert any("careless, a.json: TRACEBACK: JSONDecodeError" in line for line in faults)
    assert any("careless, a.json: OTHER: accepted with other contents" in line for line in faults)
