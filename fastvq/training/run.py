"""The folder of one training run."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from fastvq._files import read_json, replacing_folder, sealed, sweep, write_json
from fastvq._lock import locked
from fastvq._schema import ENTRIES, TEXT, integer, optional, require_entries
from fastvq._version import __version__
from fastvq.distributed import Group
from fastvq.errors import FileConflictError, MissingFileError
from fastvq.models import PretrainedModel
from fastvq.training.checkpoint import checkpoints
from fastvq.training.config import NEUTRAL_FIELDS

CONFIG = "config.json"
BEST = "validation.json"
# Beside the neutral fields, what a run may go on with.
_LENGTH = "steps"


def versions() -> dict[str, str]:
    return {
        "fastvq": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


class RunFolder:
    """``config.json``, ``checkpoints/``, ``logs/``, ``images/``, ``best/`` and, once training has finished, ``model/``.

    While a finished run is trained further, ``model/`` stays what it was; ``config.json`` then holds its steps as
    ``model_steps``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.images = path / "images"
        self.best = path / "best"
        self.model = path / "model"

    def record(self) -> dict[str, Any]:
        """What the run is: ``config.json``.

        Raises:
            MissingFileError, CorruptFileError: it is not there, or not a record of a run.
        """
        record = read_json(self.config)
        require_entries(self.config, record, {"model": ENTRIES, "train": ENTRIES, "data": ENTRIES})
        require_entries(
            self.config,
            record,
            {"init": ENTRIES, "notes": ENTRIES, "model_steps": integer(1), "codebooks": optional(TEXT)},
            absent=True,
        )
        require_entries(self.config, record["train"], {_LENGTH: integer(1)})
        if "init" in record:
            require_entries(self.config, record["init"], {"from": TEXT, "weights": TEXT})
        return record

    @property
    def steps(self) -> int:
        """Optimiser steps at which the run ends."""
        return int(self.record()["train"][_LENGTH])

    @property
    def finished(self) -> bool:
        return self.model.is_dir() and self.record().get("model_steps", self.steps) == self.steps

    @property
    def done(self) -> int:
        """Steps from which the run goes on: those of the newest checkpoint, or of a model without one."""
        found = checkpoints(self.checkpoints)
        if found:
            return int(found[-1].name.removeprefix("step_"))
        return int(self.record().get("model_steps", self.steps)) if self.model.is_dir() else 0

    def set_steps(self, steps: int) -> None:
        """Let the run end at ``steps``, or at the steps it has if those are more.

        Raises:
            MissingFileError: it has a model, but no checkpoint to go on from.
        """
        record, steps = self.record(), max(steps, self.done)
        if steps == self.steps:
            return
        if self.model.is_dir():
            if not checkpoints(self.checkpoints):
                raise MissingFileError(
                    f"run_dir: {self.path} holds no checkpoint to go on from; its model can be the start of a new run "
                    "(init_from)"
                )
            record.setdefault("model_steps", self.steps)
        record["train"][_LENGTH] = steps
        write_json(self.config, record)

    def finish(self, model: PretrainedModel) -> None:
        """Write the trained model."""
        model.save_pretrained(self.model, overwrite=True)
        record = self.record()
        if record.pop("model_steps", None) is not None:
            write_json(self.config, record)

    def keep_best(self, model: PretrainedModel, step: int, metric: str, value: float) -> None:
        """Write the model of the best validation so far."""
        with replacing_folder(self.best, overwrite=True) as folder:
            model.save_pretrained(folder, overwrite=True)
            write_json(folder / BEST, sealed({"step": step, "metric": metric, "value": value}))


def require_new(path: Path) -> None:
    """A folder for a new run must be empty, or not there yet.

    Raises:
        FileConflictError: something is in it.
    """
    # An interruption of the very first write leaves nothing but a temporary file, whose name begins with a dot.
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        hint = "resume it, or choose another folder" if RunFolder(path).config.is_file() else "choose another folder"
        raise FileConflictError(f"run_dir: {path} is not empty; {hint}. Nothing was changed.")


@contextlib.contextmanager
def open_run(
    path: Path,
    description: dict[str, Any],
    *,
    resume: bool,
    init: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    group: Group | None = None,
) -> Iterator[RunFolder]:
    """Claim a folder for a new run, or check that the run in it is the one described; have it alone inside the block.

    Of a group the first process does so for all, which must describe the same run.

    Args:
        description: what the run is; its entry ``train`` holds the fields of a TrainConfig.
        init: where its first weights come from.
        notes: kept in ``config.json``; nothing depends on them.

    Raises:
        FileConflictError: the folder is not empty, or, with ``resume``, holds another run; or another process has it;
            or the processes of a group describe different runs.
        MissingFileError: with ``resume``: there is no run in the folder, or no checkpoint to train it further from.
    """
    group = group or Group()
    of_first = group.from_first(json.loads(json.dumps(description)))
    with group.together():
        differences = _differences(of_first, json.loads(json.dumps(description)))
        if differences:
            raise FileConflictError(
                f"run_dir: the processes of a group must train the same run in {path}; the first one has (there) and "
                "this one has (now)\n  " + "\n  ".join(differences)
            )
    with contextlib.ExitStack() as stack:
        with group.together():
            if group.first:
                stack.enter_context(_claimed(path, description, resume, init, notes))
        yield RunFolder(path)


@contextlib.contextmanager
def _claimed(
    path: Path,
    description: dict[str, Any],
    resume: bool,
    init: Mapping[str, Any] | None,
    notes: Mapping[str, Any] | None,
) -> Iterator[None]:
    run = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise FileConflictError(f"run_dir: {path} is a file, expected a folder")
    if resume and not run.config.is_file():
        raise MissingFileError(f"run_dir: nothing to resume, {path} holds no {CONFIG}; start without resume")
    with locked(path):
        if resume:
            _check_same(run, description, init)
            sweep(path)
            if run.checkpoints.is_dir():
                for leftover in run.checkpoints.glob(".step_*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            run.set_steps(int(description["train"][_LENGTH]))
        else:
            require_new(path)
            sweep(path)
            extra = {name: dict(value) for name, value in (("init", init), ("notes", notes)) if value is not None}
            write_json(run.config, {**description, **extra, "versions": versions()})
        yield


def _check_same(run: RunFolder, description: dict[str, Any], init: Mapping[str, Any] | None) -> None:
    record = run.record()
    differences = _differences(record, json.loads(json.dumps(description)))
    started = record.get("init") or {}
    if init is not None and init["from"] != started.get("from"):
        differences.append(f"init_from: {started.get('from')!r} there, {init['from']!r} now")
    if differences:
        raise FileConflictError(
            f"run_dir: the run in {run.path} differs from the one to resume in\n  " + "\n  ".join(differences)
        )


def _differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for section, values in now.items():
        old = there.get(section)
        if not isinstance(values, dict) or not isinstance(old, dict):
            if old != values:
                found.append(f"{section}: {old!r} there, {values!r} now")
            continue
        for name in sorted(set(values) | set(old)):
            if section == "train" and (name in NEUTRAL_FIELDS or name == _LENGTH):
                continue
            if old.get(name) != values.get(name):
                found.append(f"{section}.{name}: {old.get(name)!r} there, {values.get(name)!r} now")
    return found
