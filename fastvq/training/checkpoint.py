"""Checkpoints: one folder each, tensors as safetensors and the rest as JSON, whole or not there at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvq._files import read_json, reading, replacing_folder, require_seal, save_tensors, sealed, sha256, write_json
from fastvq._schema import ENTRIES, TEXT, Kind, integer, named, require_entries, several
from fastvq._tensors import read_safetensors
from fastvq.errors import CorruptFileError, MissingFileError
from fastvq.models.stored import load_in_place
from fastvq.training.ema import WeightAverage

FORMAT = 1
TENSORS, DESCRIPTION = "state.safetensors", "state.json"
_ENTRIES = {
    "step": integer(),
    "totals": named(Kind("a number", lambda value: isinstance(value, (int, float)))),
    "totals_steps": integer(),
    "optimizer": ENTRIES,
    "sha256": TEXT,
}
_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class TrainingState:
    """Everything that the steps to come depend on, beside data and configuration.

    Attributes:
        step: finished optimiser steps.
        totals: sums of the training metrics since they were last logged, and how many steps they cover.
    """

    model: nn.Module
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int
    totals: dict[str, float]
    totals_steps: int


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def save_checkpoint(folder: Path, state: TrainingState, *, keep: int, versions: Mapping[str, str]) -> Path:
    """Write ``step_XXXXXXXX`` into a folder, then remove all but the newest ``keep`` checkpoints there.

    Raises:
        DiskFullError: there is no room; the earlier checkpoints are as they were.
    """
    path = checkpoint_path(folder, state.step)
    if not path.exists():
        tensors, optimizer = _tensors(state)
        with replacing_folder(path) as temporary:
            save_tensors(tensors, temporary / TENSORS)
            description = {
                "format": FORMAT,
                "step": state.step,
                "totals": state.totals,
                "totals_steps": state.totals_steps,
                "optimizer": optimizer,
                "versions": dict(versions),
                "sha256": sha256(temporary / TENSORS),
            }
            write_json(temporary / DESCRIPTION, sealed(description))
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: a removal cut short must not leave a damaged checkpoint under a good one's name.
        retired = old.with_name(f".{old.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        old.rename(retired)
        shutil.rmtree(retired)
    return path


def read_description(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, its files having been compared with it.

    Raises:
        CorruptFileError, MissingFileError: a file is missing or damaged.
    """
    description = read_json(path / DESCRIPTION)
    if description.get("format") != FORMAT:
        raise CorruptFileError(f"{path / DESCRIPTION}: format {description.get('format')!r}, expected {FORMAT}")
    require_entries(path / DESCRIPTION, description, _ENTRIES)
    require_entries(path / DESCRIPTION, description["optimizer"], {"param_groups": several(ENTRIES, least=1)})
    require_seal(path / DESCRIPTION, description)
    if path != checkpoint_path(path.parent, description["step"]):
        raise CorruptFileError(f"{path / DESCRIPTION}: step {description['step']}, but the folder is {path.name}")
    if not (path / TENSORS).is_file():
        raise CorruptFileError(f"{path / TENSORS}: no such file")
    if sha256(path / TENSORS) != description["sha256"]:
        raise CorruptFileError(f"{path / TENSORS}: checksum differs from the one in {DESCRIPTION}")
    return description


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Bring ``state`` and PyTorch's generators to where a checkpoint was written.

    Raises:
        CorruptFileError: a file is missing, damaged or does not fit the model; says how to go on without it.
    """
    try:
        description = read_description(path)
        tensors = read_safetensors(path / TENSORS)
        with reading(f"{path}: does not fit this run"):
            _restore(tensors, description, state)
    except (CorruptFileError, MissingFileError) as error:
        older = [other for other in checkpoints(path.parent) if other.name < path.name]
        remedy = (
            f"To go on from the checkpoint before it, {older[-1].name}, remove the folder {path} and resume again."
            if older
            else "There is no older checkpoint; start again in another folder."
        )
        raise CorruptFileError(f"the newest checkpoint is damaged: {error}\n{remedy}") from error


def _tensors(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by name, and the optimiser's state without them."""
    tensors = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in state.average.model.state_dict().items()}
    optimizer = state.optimizer.state_dict()
    for index, values in optimizer["state"].items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in values.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if state.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(state.device)
    # Copies: safetensors refuses tensors that share memory.
    copied = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return copied, {"param_groups": optimizer["param_groups"]}


def _restore(tensors: dict[str, Tensor], description: dict[str, Any], state: TrainingState) -> None:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}, "rng": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    load_in_place(state.model, parts["model"])
    if state.average is not None:
        load_in_place(state.average.model, parts["average"])
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, field = name.partition("/")
        optimizer.setdefault(int(index), {})[field] = tensor
    groups = [{**group, "betas": tuple(group["betas"])} for group in description["optimizer"]["param_groups"]]
    state.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
    state.step = description["step"]
    state.totals = {name: float(total) for name, total in description["totals"].items()}
    state.totals_steps = description["totals_steps"]
    torch.set_rng_state(parts["rng"]["cpu"])
    # A run that moves from the CPU to a GPU has no GPU generator to go on with; its dropout starts from the seed.
    if state.device.type == "cuda" and "cuda" in parts["rng"]:
        torch.cuda.set_rng_state(parts["rng"]["cuda"], state.device)
