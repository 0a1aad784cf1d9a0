"""Weights of a model, a run, or one of its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastvq._check import require_choice
from fastvq._config import Config
from fastvq._files import read_json, reading, require_seal
from fastvq._schema import TEXT, integer, number, require_entries
from fastvq.data.codes import model_checksum
from fastvq.errors import ArgumentError, FastvqError, FileConflictError, MissingFileError
from fastvq.models import MODEL_CLASSES, PretrainedModel, load_pretrained
from fastvq.models.pretrained import WEIGHTS_FILE, load_stored, skeleton
from fastvq.training import checkpoint
from fastvq.training.run import BEST, CONFIG, RunFolder


@contextlib.contextmanager
def called(name: str) -> Iterator[None]:
    """Errors about a ``folder`` name the argument of another name that it came by."""
    try:
        yield
    except FastvqError as error:
        head, colon, rest = str(error).partition(":")
        if head != "folder":
            raise
        raise type(error)(f"{name}{colon}{rest}") from error


def load_weights(
    folder: str | os.PathLike[str], *, weights: str = "last", device: str | torch.device = "cpu"
) -> PretrainedModel:
    """The model in a folder, in evaluation mode, whether or not its training has finished.

    Args:
        folder: a saved model, a run, or one checkpoint of a run.
        weights: of a run: ``last``, the finished model or else the newest checkpoint, or ``best``, those with the
            lowest validation loss. Checkpoints give the averaged weights.
        device: where to put it.

    Raises:
        MissingFileError: nothing of the kind there.
        CorruptFileError: damaged files.
    """
    folder = Path(folder)
    require_choice("weights", weights, ("last", "best"))
    if (folder / checkpoint.DESCRIPTION).is_file():
        return _of_checkpoint(folder, device)
    if (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG).is_file():
        return load_pretrained(folder, device=device)
    run = RunFolder(folder)
    if weights == "best":
        if not run.best.is_dir():
            raise MissingFileError(f"folder: {folder} holds no best weights; they come with its first validation")
        return load_pretrained(run.best, device=device)
    if run.model.is_dir():
        return load_pretrained(run.model, device=device)
    newest = checkpoint.checkpoints(run.checkpoints)[-1:]
    if not newest:
        raise MissingFileError(f"folder: {folder} holds neither a model nor a checkpoint yet")
    return _of_checkpoint(newest[0], device)


def _of_checkpoint(folder: Path, device: str | torch.device) -> PretrainedModel:
    checkpoint.read_description(folder)
    run = RunFolder(folder.parent.parent)
    path, misfit = folder / checkpoint.TENSORS, f"{folder}: does not fit the run it lies in"
    record = run.record()
    with reading(misfit), safe_open(path, framework="pt") as file:
        model_class, config = described_model(record["model"])
        averaged = any(name.startswith("average/") for name in file.keys())  # noqa: SIM118
    prefix = "average/" if averaged else "model/"
    return load_stored(model_class, config, path, misfit, prefix).to(device).eval()


def described_model(description: Mapping[str, Any]) -> tuple[type[PretrainedModel], Config]:
    """Class and configuration of a model, from what a run's ``config.json`` says of it.

    Raises:
        ArgumentError: a class or a field that is not known.
    """
    fields = {name: value for name, value in description.items() if name != "class"}
    model_class = MODEL_CLASSES.get(str(description.get("class")))
    if model_class is None:
        raise ArgumentError(f"class: expected one of {sorted(MODEL_CLASSES)}, got {description.get('class')!r}")
    return model_class, model_class.config_class.from_dict(fields)


def starting_weights(folder: str | os.PathLike[str], description: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Checksum and state of the model in a folder, for a new model to start from.

    Args:
        folder: as of :func:`load_weights`.
        description: of the new model, as in a run's ``config.json``.

    Raises:
        ArgumentError: another class of model, or parameters of other shapes; names them.
    """
    with called("init_from"):
        source = load_weights(folder)
    model_class, config = described_model(description)
    if type(source) is not model_class:
        raise ArgumentError(
            f"init_from: {folder} holds a {type(source).__name__}, the new model is a {model_class.__name__}"
        )
    target = skeleton(model_class, config)
    there, here = ({name: list(t.shape) for name, t in m.state_dict().items()} for m in (source, target))
    wrong = [name for name in (*here, *(n for n in there if n not in here)) if there.get(name) != here.get(name)]
    if wrong:
        old, new = dataclasses.asdict(source.config), dataclasses.asdict(config)  # type: ignore[call-overload]
        settings = [f"{name} = {old[name]!r} there, {new[name]!r} here" for name in new if old[name] != new[name]]
        first = f"{wrong[0]} is {there.get(wrong[0], 'missing')} there, {here.get(wrong[0], 'missing')} here"
        raise ArgumentError(
            f"init_from: the weights in {folder} do not fit the new model in {len(wrong)} tensor(s) ({first}); "
            f"settings that differ: {'; '.join(settings) or 'none'}"
        )
    return model_checksum(source), source.state_dict()


def describe_start(
    folder: str | os.PathLike[str] | None, description: Mapping[str, Any], *, resume: bool
) -> dict[str, Any] | None:
    """What ``config.json`` holds of where a run's first weights come from; a run that goes on needs them no more.

    Raises:
        as :func:`starting_weights`.
    """
    if folder is None:
        return None
    place = str(Path(folder).absolute())
    return {"from": place} if resume else {"from": place, "weights": starting_weights(folder, description)[0]}


def recorded_start(run: Path, record: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What a run without a checkpoint starts from, if its ``config.json`` says that it does.

    Raises:
        FileConflictError: the weights have changed since.
    """
    init = record.get("init")
    if init is None:
        return None
    checksum, state = starting_weights(init["from"], record["model"])
    if checksum != init["weights"]:
        raise FileConflictError(f"init_from: the weights in {init['from']} have changed since the run in {run} began")
    return state


def best_validation(folder: Path) -> dict[str, Any] | None:
    """``step``, ``metric`` and ``value`` of the best weights of a run, if it has any."""
    path = RunFolder(folder).best / BEST
    if not path.is_file():
        return None
    found = read_json(path)
    require_entries(path, found, {"step": integer(), "metric": TEXT, "value": number()})
    require_seal(path, found)
    return found
