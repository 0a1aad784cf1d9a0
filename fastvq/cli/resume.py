"""Settings of a run from the command line, and from the run's own record where it goes on."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fastvq._config import Config
from fastvq._files import reading
from fastvq.cli.names import configure
from fastvq.cli.project import parse_overrides
from fastvq.errors import ArgumentError, FileConflictError, MissingFileError
from fastvq.models import PriorConfig, preset
from fastvq.training import TrainConfig
from fastvq.training.config import NEUTRAL_FIELDS
from fastvq.training.progress import Show
from fastvq.training.recipes import RECIPES, prior_preset
from fastvq.training.run import CONFIG, RunFolder
from fastvq.training.weights import called, described_model, load_weights

C = TypeVar("C", bound=Config)

# Options of training commands and the fields of TrainConfig that they set.
_FIELDS = {
    "steps": "steps",
    "batch_size": "batch_size",
    "lr": "learning_rate",
    "optimizer": "optimizer",
    "weight_decay": "weight_decay",
    "warmup": "warmup_steps",
    "grad_clip": "grad_clip",
    "ema": "ema_decay",
    "bf16": "bf16",
    "compile": "compile",
    "cuda_graph": "cuda_graph",
    "accumulate": "accumulate",
    "validation": "validation_fraction",
    "seed": "seed",
    "log_every": "log_every",
    "validate_every": "validate_every",
    "image_every": "image_every",
    "checkpoint_every": "checkpoint_every",
    "workers": "num_workers",
}
_OPTIONS = {field: option for option, field in _FIELDS.items()}


def recorded(arguments: argparse.Namespace, run: Path) -> dict[str, Any] | None:
    """The record of the run to go on with, or None for a new one.

    Raises:
        MissingFileError: there is none to go on with.
    """
    if not arguments.resume:
        return None
    if not (run / CONFIG).is_file():
        raise MissingFileError(f"--resume: nothing to resume, {run} holds no {CONFIG}; start without --resume")
    return RunFolder(run).record()


def code_init(record: dict[str, Any]) -> str:
    """What ``--code-init`` of a prior's run was, or as good as was in a version without it."""
    return "random" if record.get("codebooks") is None else "codebooks"


def starting_config(folder: Path) -> Config:
    """The architecture of the model that ``--init-from`` names."""
    with called("--init-from"):
        config: Config = load_weights(folder).config
    return config


def recorded_config(record: dict[str, Any], run: Path) -> Config:
    """The architecture in the record of a run.

    Raises:
        CorruptFileError: there is none that is known.
    """
    with reading(f"{run / CONFIG}: does not say what model was trained"):
        return described_model(record["model"])[1]


def follow_recipe(arguments: argparse.Namespace, preset: str | None = None) -> dict[str, Any]:
    """Fill in from the preset's recipe what is not typed, of a new run; returns that, by option.

    Args:
        preset: to be taken where none is typed.
    """
    if arguments.resume:
        return {}
    values: dict[str, Any] = {} if preset is None or arguments.init_from else {"preset": preset}
    recipe = RECIPES.get(_preset(arguments) or values.get("preset", ""))
    if recipe is not None and recipe.schedule is not None:
        values |= {"size": list(recipe.size)} if "size" in arguments.options else {}
        values |= {_OPTIONS[field]: value for field, value in recipe.schedule.settings.items()}
    taken = {option: value for option, value in values.items() if getattr(arguments, option) is None}
    for option, value in taken.items():
        setattr(arguments, option, value)
    return taken


def preset_name(arguments: argparse.Namespace, run: Path) -> str | None:
    """The preset that the model of a run is of, perhaps with some fields changed, if it is of one."""
    record = recorded(arguments, run)
    name = _preset(arguments) if record is None else record.get("notes", {}).get("preset")
    return name if isinstance(name, str) else None


def _preset(arguments: argparse.Namespace) -> str | None:
    """The preset that options of a new run name; a model to start from brings its own architecture."""
    found: str | None = arguments.preset or (None if arguments.init_from else arguments.default_preset)
    return found


def preset_for_codes(vqvae: Path, level: int) -> str | None:
    """The preset whose recipe says that it learns a level of the codes of the autoencoder in a run, if any does."""
    run = RunFolder(vqvae)
    noted = run.record().get("notes", {}).get("preset") if run.config.is_file() else None
    name = prior_preset(noted, level) if isinstance(noted, str) else None
    return None if name is None or RECIPES[name].schedule is None else name


def train_config(arguments: argparse.Namespace, run: Path, device: str, **defaults: Any) -> TrainConfig:
    """What the options say; of a run that goes on, what its record says, and the options that may change.

    Args:
        defaults: fields, where no option says otherwise.

    Raises:
        ArgumentError: ``--steps`` is missing, or a value does not fit.
        FileConflictError: an option differs from the record.
    """
    typed: dict[str, Any] = {
        field: value or None if option == "ema" else value
        for option, field in _FIELDS.items()
        if (value := getattr(arguments, option, None)) is not None
    }
    record = recorded(arguments, run)
    if record is None:
        if "steps" not in typed:
            raise ArgumentError("--steps: a new run needs the number of its optimiser steps")
        values = {_FIELDS[option]: value for option, value in arguments.defaults.items()} | defaults | typed
        config = TrainConfig(**{**values, "device": device})
        if not arguments.quiet and config.checkpoint_every and config.steps > config.checkpoint_every:
            every = config.checkpoint_every
            print(f"checkpoints every {every} steps; stop with Ctrl-C, go on with --resume", file=sys.stderr)
        return config
    there = record["train"]
    may_change = NEUTRAL_FIELDS | {"steps"}
    for option, field in _FIELDS.items():
        if field in typed and field not in may_change and typed[field] != there.get(field):
            refuse(f"--{option.replace('_', '-')}", run, there.get(field), typed[field])
    with reading(f"{run / CONFIG}: its settings of training do not fit"):
        config = TrainConfig.from_dict({**there, "device": device})
    return dataclasses.replace(config, **typed)


def model_config(arguments: argparse.Namespace, run: Path, kind: type[C], **overrides: Any) -> C:
    """The architecture: of ``--preset`` and ``--set``, of the model to start from, or of the run that goes on.

    Args:
        kind: of configuration that is expected.
        overrides: fields that other options set.

    Raises:
        ArgumentError: there is none, or one of another kind.
        FileConflictError: an option differs from the record.
    """
    record = recorded(arguments, run)
    config: Config
    settings = parse_overrides(arguments.set)
    typed = {"in_channels": "--channels"} if "in_channels" in overrides and "in_channels" not in settings else {}
    overrides = {**overrides, **settings}
    if record is not None:
        config = recorded_config(record, run)
        noted = record.get("notes", {}).get("preset")
        if arguments.preset not in (None, noted):
            _, other = preset(arguments.preset, **overrides)
            wanted = {name: value for name, value in other.to_dict().items() if name in config.to_dict()}
            # What the codes and the classes of the data decide is no matter of the preset.
            fitted = ("level", "shape", "num_codes", "num_classes", "condition_shapes", "condition_num_codes")
            ignored = fitted if isinstance(other, PriorConfig) else ()
            overrides = {name: value for name, value in wanted.items() if name not in ignored}
            if type(other) is not type(config):
                refuse("--preset", run, type(config).__name__, type(other).__name__)
        stored = dataclasses.asdict(config)  # type: ignore[call-overload]
        for name, value in overrides.items():
            if name not in stored:
                configure(config, {name: value})  # which says what fields there are
            if _plain(stored[name]) != _plain(value):
                option = "--channels" if name == "in_channels" and arguments.channels else f"--set {name}"
                refuse(option if arguments.preset in (None, noted) else f"--preset ({name})", run, stored[name], value)
    elif arguments.init_from is not None and arguments.preset is None:
        source = starting_config(arguments.init_from)
        config = configure(source, overrides, typed)
    else:
        named = _preset(arguments)
        if named is None:
            raise ArgumentError("--preset: a new run needs an architecture; `fastvq info` lists them")
        _, config = preset(named)
        if isinstance(config, kind):
            config = configure(config, overrides, typed)
    if not isinstance(config, kind):
        expected, got = ("a prior", "an autoencoder") if kind is PriorConfig else ("an autoencoder", "a prior")
        raise ArgumentError(f"--preset: {arguments.preset or config} is {got}, expected {expected}")
    return config


def shown(arguments: argparse.Namespace) -> Show:
    """How ``--quiet`` and ``--plain`` want progress to be shown."""
    return False if arguments.quiet else "plain" if arguments.plain else True


def notes(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What of the command line a run's record keeps beside its settings."""
    return {"preset": _preset(arguments), "set": arguments.set, **more}


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def refuse(option: str, run: Path, there: object, now: object) -> NoReturn:
    """A run that goes on does not take an option that its record says otherwise."""
    raise FileConflictError(
        f"{option}: the run in {run} has {there!r}, got {now!r}; --resume needs no settings, and can change --steps, "
        "--device, --workers and how often something is validated or written"
    )
