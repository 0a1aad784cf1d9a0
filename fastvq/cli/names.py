"""What messages call things: the options that were typed instead of the Python arguments they become."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from fastvq._names import closest_first
from fastvq.errors import ArgumentError, ArgumentTypeError

C = TypeVar("C")

# Arguments that have another name than their option, wherever a command has that option.
_ALIASES = {
    "learning_rate": "--lr",
    "warmup_steps": "--warmup",
    "ema_decay": "--ema",
    "num_workers": "--workers",
    "validation_fraction": "--validation",
    "fraction": "--validation",
    "training and validation": "--validation",
    "max_shift": "--shift",
    "horizontal_flip": "--flip",
    "root": "--data",
    "dataset": "--data",
    "run_dir": "--run",
    "folder": "--run",
    "overrides": "--set",
}
_BY_COMMAND = {
    "sample": {"image": "--like"},
    "reconstruct": {"image_size": "--size", "images": "--size"},
    "demo": {"--run": "--out", "run_dir": "--out", "folder": "--out", "steps": "--effort"},
    "train-vqvae": {"name": "--preset"},
    "info": {"image_size": "--size"},
    "train-prior": {"name": "--preset", "codes_folder": "--run", "validation_folder": "--run"},
    "evaluate": {
        "samples": "-n",
        "keep": "--vectors",
        "fractions": "--keep",
        "steps": "--accuracy-steps",
        "accuracy": "--accuracy-steps",
        "weights": "--inception",
    },
}
# What names the model in commands that take one in several ways.
_MODEL_ARGUMENTS = ("name", "folder", "--run")
_NAME = r"(?:--)?[a-z]\w*(?:-\w+)*"
_PREFIX = re.compile(rf"({_NAME}(?:\.\w+|\[\d+\])?(?: and {_NAME})*): ")


def options_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """By the attribute that an option becomes: how it is typed."""
    return {
        action.dest: max(action.option_strings, key=len)
        if action.option_strings
        else str(action.metavar or action.dest)
        for action in parser._actions
    }


def as_typed(message: str, command: str, arguments: argparse.Namespace, options: Mapping[str, str]) -> str:
    """A message of the library in the words of the command line.

    Args:
        command: what was called.
        options: as :func:`options_of` gives them.
    """
    known = set(options.values())
    names = {**options, **{name: option for name, option in _ALIASES.items() if option in known}}
    names |= _BY_COMMAND.get(command, {})
    model = _model_option(arguments, options)
    if model is not None:
        names |= dict.fromkeys(_MODEL_ARGUMENTS, model)
    if getattr(arguments, "from_shards", None) is not None:
        names["folder"] = options["from_shards"]
    found = _PREFIX.match(message)
    head, rest = ("", message) if found is None else (found[1], message[found.end() :])
    if head:
        field = head.partition("model_config.")[2]
        if field and "--set" in known:
            head = f"--set {field}"
        elif head in names:
            head = names[head]
        else:
            head = " and ".join(names.get(part, part) for part in head.split(" and "))
    rest = rest.replace("skip_broken=True", "--skip-broken")
    # In running text only names that no sentence has as a word.
    words = [name for name in names if "_" in name]
    if words:
        pattern = rf"(?<![\w./'-])({'|'.join(map(re.escape, words))})(?![\w/'=-]|\.\w)"
        rest = re.sub(pattern, lambda word: names[word[1]], rest)
    return f"{head}: {rest}" if head else rest


def _model_option(arguments: argparse.Namespace, options: Mapping[str, str]) -> str | None:
    """The option that named the model, in commands that use one."""
    if "pretrained" not in options:
        return None
    for given in ("pretrained", "preset"):
        if getattr(arguments, given, None) is not None:
            return options[given]
    return options.get("checkpoint") or options["run"]


def configure(template: C, settings: Mapping[str, Any], typed: Mapping[str, str] | None = None) -> C:
    """A configuration with the fields of ``--set`` replaced.

    Args:
        typed: fields that another option sets: field and option.

    Raises:
        ArgumentError, ArgumentTypeError: naming ``--set FIELD``; for no such field all there are, the closest first.
    """
    kind = type(template).__name__
    fields = [field.name for field in dataclasses.fields(template)]  # type: ignore[arg-type]
    for name in settings:
        if name not in fields:
            closest = closest_first(name, fields)
            raise ArgumentError(f"--set {name}: {kind} has no such field; closest first, it has {', '.join(closest)}")
    try:
        return dataclasses.replace(template, **settings)  # type: ignore[type-var]
    except (ArgumentError, ArgumentTypeError) as error:
        name, colon, rest = str(error).partition(": ")
        if not colon or name not in fields:
            raise
        option = (typed or {}).get(name, f"--set {name}")
        raise type(error)(f"{option}: {rest}") from error
