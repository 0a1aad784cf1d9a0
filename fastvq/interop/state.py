"""State dicts of other projects, read safely and brought to one spelling."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError, CorruptFileError, MissingFileError

# What DataParallel, DistributedDataParallel and torch.compile put before every name.
WRAPPERS = ("module.", "_orig_mod.")
_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def normalise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without prefixes of wrappers and with weight norm under its older names."""
    names = {name: name for name in tensors}
    for _ in range(2 * len(WRAPPERS)):
        for prefix in WRAPPERS:
            if names and all(name.startswith(prefix) for name in names.values()):
                names = {given: name[len(prefix) :] for given, name in names.items()}
    for given, name in names.items():
        for new, old in _WEIGHT_NORM.items():
            if name.endswith("." + new):
                names[given] = name[: -len(new)] + old
    if len(set(names.values())) < len(names):
        raise ArgumentError("source: holds the same weight-normalised layer under both spellings")
    return {name: tensors[given] for given, name in names.items()}


def read(source: object) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """A normalised state dict and the arguments stored beside it, from a path or something already loaded."""
    content = _read_file(Path(source)) if isinstance(source, (str, os.PathLike)) else source
    arguments: object = {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content, arguments = content["model"], content.get("args")
    if not isinstance(content, Mapping):
        raise ArgumentTypeError(
            "source: expected the path of a checkpoint, a state dict or {'model': state dict, 'args': ...}, "
            f"got {type(content).__name__}"
        )
    strangers = [repr(name) for name, value in content.items() if not isinstance(name, str) or not _is_tensor(value)]
    if strangers or not content:
        found = f"{', '.join(strangers[:5])} which are not" if strangers else "none"
        raise ArgumentError(f"source: expected a state dict of named tensors, got {found}")
    return normalise(content), vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise MissingFileError(f"source: {path} does not exist or is not a file")
    try:
        # Nothing but tensors, plain containers and the parsed command line of the training script may be unpickled.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = _other_globals(path)
        if needed:
            raise CorruptFileError(
                f"source: {path} asks for {', '.join(needed)}, which loading would import and run; expected tensors, "
                "plain containers and argparse.Namespace. Save the state dict alone where you trust the file"
            ) from error
        raise CorruptFileError(f"source: {path} is not a checkpoint of tensors ({_first_line(error)})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CorruptFileError(f"source: {path} is damaged or not a checkpoint ({_first_line(error)})") from error


def _other_globals(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        # Only a help to the message: files of the oldest format, and damaged ones, cannot be listed.
        return []


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
