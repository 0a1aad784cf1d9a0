"""State dicts of other projects, read safely and brought to one spelling."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvq._tensors import read_checkpoint
from fastvq._unwrap import AVERAGED, WRAPPERS
from fastvq.errors import ArgumentError, ArgumentTypeError

# What training frameworks put before every name besides, and under which names they store the state dict.
PREFIXES = (*WRAPPERS, "model.", "net.")
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
_DEEPEST = 4
_ACCEPTED = (
    f"a state dict of tensors, alone or under {', '.join(map(repr, CONTAINERS))}, whose names may all begin with "
    f"{', '.join(map(repr, PREFIXES))}"
)
_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def normalise(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...] = WRAPPERS) -> dict[str, Tensor]:
    """The same tensors without prefixes of wrappers and with weight norm under its older names."""
    names = {name: name for name in tensors if name != AVERAGED}
    for _ in range(2 * len(prefixes)):
        for prefix in prefixes:
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
    content: object = source
    if isinstance(source, (str, os.PathLike)):
        content = read_checkpoint("source", Path(source), argparse.Namespace)
    arguments: object = {}
    for _ in range(_DEEPEST):
        inner = next((name for name in CONTAINERS if isinstance(_entry(content, name), Mapping)), None)
        if inner is None:
            break
        arguments, content = _entry(content, "args") or arguments, _entry(content, inner)
    if not isinstance(content, Mapping):
        raise ArgumentTypeError(f"source: expected the path of a checkpoint, or {_ACCEPTED}, got {_kind(content)}")
    strangers = [repr(name)[:60] for name, value in content.items() if not _is_named_tensor(name, value)]
    if strangers or not content:
        found = f"{', '.join(strangers[:5])} which are not" if strangers else "none"
        raise ArgumentError(f"source: expected a state dict of named tensors, got {found}; accepted is {_ACCEPTED}")
    return normalise(content, PREFIXES), vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _entry(content: object, name: str) -> object:
    return content.get(name) if isinstance(content, Mapping) else None


def _kind(content: object) -> str:
    return type(content).__name__


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)
