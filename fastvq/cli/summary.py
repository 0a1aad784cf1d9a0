"""What a run is about to do, printed before it begins: data, model, steps, memory, time; and what speaks against it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq._config import Config
from fastvq.data import CodeDataset, ImageDataset
from fastvq.models import PRESETS, HierarchicalVQVAE, PriorConfig, build
from fastvq.models.stored import outline
from fastvq.training import TrainConfig, training_memory
from fastvq.training.machine import device_title, free_memory
from fastvq.training.recipes import MEASURED, RECIPES
from fastvq.training.run import RunFolder

# Of parameters: with more a CPU takes seconds for a step of a few images.
TOO_MANY_FOR_A_CPU = 300_000_000


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run that is about to begin or to go on.

    Attributes:
        data: lines that say what it learns from, each with its title.
        rows: images, or rows of codes, to train on.
        preset: by name, if the model is of one.
        size: (H, W) of images; None for priors.
        taken: from the preset's recipe, by option.
        processes: that train together.
    """

    run: Path
    model: Config
    config: TrainConfig
    data: Sequence[tuple[str, str]]
    rows: int
    preset: str | None = None
    size: tuple[int, int] | None = None
    taken: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1


def announce(arguments: argparse.Namespace, start: Start) -> bool:
    """Print the summary unless told to be quiet; returns whether to go on."""
    if not arguments.quiet:
        model = outline(lambda: build(start.model))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        device = start.config.device or "cpu"
        needed, free = _peak(start), free_memory(device)
        lines = [
            *start.data,
            ("model", _model(start, model, parameters)),
            *([("from recipe", _recipe(arguments, start.taken))] if start.taken else []),
            ("training", _training(start)),
            ("device", _device(device, start.processes)),
            ("memory", f"about {bytes_text(needed)}{'' if free is None else f' of {bytes_text(free)} that are free'}"),
            *_duration(arguments, start, device),
        ]
        print("\n".join(f"{title:11} {text}" for title, text in lines), flush=True)
        for text in _warnings(start, parameters, device, needed, free):
            print(f"fastvq: warning: {text}", file=sys.stderr)
        if arguments.dry_run:
            print("nothing was written (--dry-run)")
    return not arguments.dry_run


def of_images(dataset: ImageDataset, training: int, held_out: int) -> list[tuple[str, str]]:
    """Lines on images, their classes and how they are split."""
    height, width = dataset.size
    aside = [
        f"{len(found)} {what}"
        for name, what in (("skipped", "cannot be read"), ("left_out", "no pictures"))
        if (found := getattr(dataset, name, ()))
    ]
    more = f"; left out: {', '.join(aside)}" if aside else ""
    channels = "grey" if dataset.channels == 1 else "colour"
    return [
        ("images", f"{len(dataset)}, {height} x {width}, {channels}{more}"),
        ("classes", _classes(dataset.labels, dataset.class_names)),
        ("split", f"{training} to train on, {held_out} held out" if held_out else f"all {training} to train on"),
    ]


def of_codes(codes: CodeDataset, level: int, held_out: int) -> list[tuple[str, str]]:
    """Lines on the codes of a level."""
    grids = [f"{height} x {width}" for height, width in codes.shapes]
    above = f", given {', '.join(grids[:level])}" if level else ""
    return [
        ("codes", f"{grids[level]} of {codes.num_codes[level]}{above}"),
        ("classes", _classes(codes.labels, codes.class_names)),
        ("split", f"{len(codes)} rows to train on, {held_out or 'none'} held out"),
    ]


def bytes_text(count: float) -> str:
    """Bytes as people say them: three digits and a decimal unit."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:.0f} GB"


def number_text(count: int) -> str:
    """A number of parameters: "1.7 billion", "25.3 million"."""
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def time_text(seconds: float) -> str:
    """A span of time with its two largest units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _classes(labels: Tensor | None, names: Sequence[str]) -> str:
    if labels is None:
        return "none"
    counts = torch.bincount(labels, minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    if len(names) == 1:
        return f"1, {names[0]}"
    return f"{len(counts)}, of {counts[least]} ({_name(names, least)}) to {counts[most]} ({_name(names, most)})"


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)


def _model(start: Start, model: torch.nn.Module, parameters: int) -> str:
    text = f"{start.preset or type(model).__name__}, {number_text(parameters)} parameters"
    if isinstance(model, HierarchicalVQVAE) and start.size is not None:
        grids = ", ".join(f"{height} x {width}" for height, width in model.code_shapes(start.size))
        text += f"; codes {grids} (top first) of {model.config.num_codes}"
    return text


def _recipe(arguments: argparse.Namespace, taken: Mapping[str, Any]) -> str:
    values = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in taken.items()}
    return " ".join(f"{arguments.options[name]} {value}" for name, value in values.items())


def _training(start: Start) -> str:
    config = start.config
    epochs = config.steps * config.batch_size / start.rows
    text = f"{config.steps} steps of {config.batch_size}, {epochs:.3g} epochs"
    run = RunFolder(start.run)
    if run.config.is_file():
        text += f"; {run.done} steps are done"
    return text + ("" if config.accumulate == 1 else f"; each in {config.accumulate} parts")


def _device(device: str, processes: int) -> str:
    title = f"{device} ({device_title(device)})"
    return title if processes == 1 else f"{title} for each of {processes} processes"


def _duration(arguments: argparse.Namespace, start: Start, device: str) -> list[tuple[str, str]]:
    """How long it will take, where just this was measured on such a device."""
    recipe = RECIPES.get(start.preset or "")
    if recipe is None or recipe.schedule is None or arguments.set or start.processes > 1:
        return []
    if start.config.batch_size != recipe.schedule.batch_size or start.size not in (None, recipe.size):
        return []
    title = device_title(device)
    run = RunFolder(start.run)
    left = start.config.steps - (run.done if run.config.is_file() else 0)
    return [
        (
            "duration",
            f"about {time_text(one.seconds * left / 1000)}: {one.seconds:.4g} s per 1000 steps on {one.device}",
        )
        for one in MEASURED.get(start.preset or "", ())
        if one.device in title
    ][:1]


def _warnings(start: Start, parameters: int, device: str, needed: int, free: int | None) -> list[str]:
    found = []
    if parameters > TOO_MANY_FOR_A_CPU and torch.device(device).type == "cpu":
        found.append(
            f"{number_text(parameters)} parameters are too many for a CPU; `fastvq info` lists smaller presets"
        )
    if free is not None and needed > free:
        found.append(f"the memory does not suffice; {_advice(start, free)}")
    recipe = RECIPES.get(start.preset or "")
    if recipe is not None and start.size not in (None, recipe.size):
        sides = [" x ".join(map(str, size)) for size in (recipe.size, start.size or ())]
        found.append(f"{start.preset} is meant for images of {sides[0]}, these are {sides[1]} (--size)")
    if isinstance(start.model, PriorConfig) and start.preset in PRESETS:
        meant = PRESETS[start.preset][1]
        if isinstance(meant, PriorConfig) and meant.shape != start.model.shape:
            sides = [" x ".join(map(str, shape)) for shape in (meant.shape, start.model.shape)]
            found.append(f"{start.preset} is meant for grids of {sides[0]} codes, these are {sides[1]}")
    return found


def _advice(start: Start, free: int) -> str:
    """The fewest parts with which a step fits."""
    batch, parts = start.config.batch_size, start.config.accumulate

    def part(rows: int) -> int:
        config = dataclasses.replace(start.config, batch_size=rows * start.processes, accumulate=1)
        return _peak(dataclasses.replace(start, config=config))

    least = part(1)
    row = part(2) - least
    for count in range(parts + 1, batch // start.processes + 1):
        rows = batch // count // start.processes
        # The whole step is counted only where the parts alone leave room for it.
        if batch % count == 0 and least + row * (rows - 1) <= free and (peak := _peak(start, count)) <= free:
            return f"--accumulate {count}, or --batch-size {batch * parts // count}, takes about {bytes_text(peak)}"
    return "not even a row at a time fits: take a smaller model (`fastvq info` lists them)"


def _peak(start: Start, accumulate: int | None = None) -> int:
    """Memory of a step in so many parts; of many parts as two and three of them say, each of which takes its time."""
    config = start.config if accumulate is None else dataclasses.replace(start.config, accumulate=accumulate)

    def peak(parts: int) -> int:
        one = -(-config.batch_size // config.accumulate)
        part = dataclasses.replace(config, batch_size=parts * one, accumulate=parts)
        return training_memory(start.model, part, image_size=start.size, processes=start.processes).peak

    if config.accumulate <= 3:
        return peak(config.accumulate)
    two, three = peak(2), peak(3)
    return two + (config.accumulate - 2) * (three - two)
