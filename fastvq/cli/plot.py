"""The command that draws curves of training: ``plot``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from fastvq.cli.project import Project
from fastvq.data.usage import level_name
from fastvq.errors import ArgumentError, FileConflictError, MissingFileError
from fastvq.evaluation.curves import Panel, draw_panels, require_matplotlib
from fastvq.training.log import metrics_path, read_metrics
from fastvq.training.run import RunFolder

NAME = "curves.png"
_SPLITS = {"train": "training", "validation": "validation"}
Curve = tuple[list[int], list[float]]


def plot(arguments: argparse.Namespace) -> None:
    out = arguments.run / NAME if arguments.out is None else arguments.out
    if out.suffix.lower() != ".png":
        raise ArgumentError(f"--out: expected a name that ends in .png, got {out}")
    runs = _runs(arguments.run)
    if out.is_dir() or (out.exists() and not arguments.overwrite):
        raise FileConflictError(f"--out: {out} exists already; choose another name, or replace it with --overwrite")
    require_matplotlib()
    draw_panels({run.name: _panels(run) for run in runs}, out)
    print(f"curves of {', '.join(run.name for run in runs)} in {out}")


def _runs(folder: Path) -> list[Path]:
    """A run, or those of a project in which something has been logged, in the order of their training."""
    if not folder.is_dir():
        raise MissingFileError(f"RUN: {folder} is not a folder; expected a project or a run")
    runs = [folder.resolve()]
    if not (folder / "logs").is_dir():
        project = Project(folder)
        first = [project.vqvae, *sorted(folder.glob("prior*"))]
        runs = [*first, *(run for run in sorted(folder.iterdir()) if run not in first)]
    logged = [run for run in runs if metrics_path(run).is_file() and read_metrics(run)]
    if not logged:
        raise MissingFileError(
            f"RUN: {folder} holds no log of training, neither its own nor of a run in it; training writes the first "
            "line after --log-every steps"
        )
    return logged


def _panels(run: Path) -> list[Panel]:
    """What there is to see of a run, by its stage."""
    record, entries = RunFolder(run).record(), read_metrics(run)
    codes = record["model"].get("num_codes")

    def curves(factor: float = 1.0, **names: str) -> dict[str, Curve]:
        """Of a metric for each split, those that have values."""
        found = {_SPLITS[split]: _curve(entries, split, name) for split, name in names.items()}
        return {
            label: (steps, [factor * value for value in values]) for label, (steps, values) in found.items() if steps
        }

    stage = record.get("stage")
    if stage == 1:
        found = [
            Panel("loss", curves(train="loss"), logarithmic=True),
            Panel("mean squared error", curves(train="mse", validation="mse"), logarithmic=True),
            Panel("perplexity", _of_levels(entries, "perplexity"), bound=(f"all {codes} codes alike", codes)),
        ]
    elif stage == 2:
        nats = curves(1 / math.log(2), train="loss")
        uniform = (f"{math.log2(codes):.3g} without a prior", math.log2(codes))
        found = [Panel("NLL, bits per code", {**nats, **curves(validation="bits")}, bound=uniform)]
    else:
        found = [
            Panel("NLL, nats per image", curves(train="loss", validation="nll")),
            Panel("accuracy", curves(train="accuracy", validation="top1")),
        ]
    return [*found, Panel("learning rate", curves(train="learning_rate"))]


def _of_levels(entries: list[dict[str, Any]], metric: str) -> dict[str, Curve]:
    """Curves of each level, of validation if there was any."""
    split = "validation" if any(entry["split"] == "validation" for entry in entries) else "train"
    names = [name for name in entries[0] | entries[-1] if name.startswith(f"{metric}_")]
    return {level_name(level, len(names)): _curve(entries, split, f"{metric}_{level}") for level in range(len(names))}


def _curve(entries: list[dict[str, Any]], split: str, name: str) -> Curve:
    """Steps, and values of one metric."""
    found = [entry for entry in entries if entry["split"] == split and isinstance(entry.get(name), (int, float))]
    return [entry["step"] for entry in found], [entry[name] for entry in found]
