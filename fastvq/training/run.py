"""The folder of one training run."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

import fastvq
from fastvq._files import read_json, sweep, write_json
from fastvq._lock import locked
from fastvq.errors import FileConflictError, MissingFileError
from fastvq.training.config import NEUTRAL_FIELDS

CONFIG = "config.json"


def versions() -> dict[str, str]:
    return {
        "fastvq": fastvq.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


class RunFolder:
    """``config.json``, ``checkpoints/``, ``logs/``, ``images/`` and, once training has finished, ``model/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.images = path / "images"
        self.model = path / "model"

    @property
    def finished(self) -> bool:
        return self.model.is_dir()


@contextlib.contextmanager
def open_run(path: Path, description: dict[str, Any], *, resume: bool) -> Iterator[RunFolder]:
    """Claim a folder for a new run, or check that the run in it is the one described; have it alone inside the block.

    Args:
        description: what the run is; its entry ``train`` holds the fields of a TrainConfig.

    Raises:
        FileConflictError: the folder is not empty, or, with ``resume``, holds another run; or another process has it.
        MissingFileError: with ``resume``: there is no run in the folder.
    """
    run = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise FileConflictError(f"run_dir: {path} is a file, expected a folder")
    config = path / CONFIG
    if resume and not config.is_file():
        raise MissingFileError(f"run_dir: nothing to resume, {path} holds no {CONFIG}; start without resume")
    with locked(path):
        if resume:
            _check_same(path, description)
            sweep(path)
            if run.checkpoints.is_dir():
                for leftover in run.checkpoints.glob(".step_*"):
                    shutil.rmtree(leftover, ignore_errors=True)
        else:
            # An interruption of the very first write leaves nothing but a temporary file, whose name begins with a dot.
            if any(not entry.name.startswith(".") for entry in path.iterdir()):
                hint = "resume it, or choose another folder" if config.is_file() else "choose another folder"
                raise FileConflictError(f"run_dir: {path} is not empty; {hint}. Nothing was changed.")
            sweep(path)
            write_json(config, {**description, "versions": versions()})
        yield run


def _check_same(path: Path, description: dict[str, Any]) -> None:
    differences = _differences(read_json(path / CONFIG), json.loads(json.dumps(description)))
    if differences:
        raise FileConflictError(
            f"run_dir: the run in {path} differs from the one to resume in\n  " + "\n  ".join(differences)
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
            if section == "train" and name in NEUTRAL_FIELDS:
                continue
            if old.get(name) != values.get(name):
                found.append(f"{section}.{name}: {old.get(name)!r} there, {values.get(name)!r} now")
    return found
