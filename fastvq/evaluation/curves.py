"""Curves as pictures, of rejection and of training; the only place that needs matplotlib."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvq._files import replacing_file
from fastvq.errors import UnavailableError
from fastvq.evaluation.rejection import CurvePoint

# Curves of fewer points show them.
_FEW_POINTS = 30


def require_matplotlib(otherwise: str = "") -> None:
    """
    Args:
        otherwise: what can be done instead of installing it.

    Raises:
        UnavailableError: matplotlib cannot be imported.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UnavailableError(
            f'the curves are drawn by matplotlib, which cannot be imported ({error}); pip install "fastvq[eval]"'
            f"{otherwise}"
        ) from error


def draw_curve(points: Sequence[CurvePoint], path: Path, *, frechet_name: str, features: str) -> None:
    """Write a PNG: precision and recall, and the Fréchet distance where it is known, against the fraction kept.

    Args:
        features: title of the extractor that all scores depend on.
    """
    require_matplotlib()
    ordered = sorted(points, key=lambda point: point.keep)
    kept = [100 * point.keep for point in ordered]
    distances = [(k, p.frechet) for k, p in zip(kept, ordered, strict=True) if p.frechet is not None]
    count = 3 if distances else 2
    figure = _figure(10 * count / 3, 3.4)
    figure.suptitle(f"features: {features}", fontsize="medium")
    panels = figure.subplots(1, count)
    panels[0].plot(kept, [p.precision for p in ordered], "o-", label="precision")
    panels[0].plot(kept, [p.recall for p in ordered], "s-", label="recall")
    panels[0].plot(kept, [p.coverage for p in ordered], "^--", label="coverage")
    panels[0].legend()
    panels[0].set(xlabel="samples kept, %")
    panels[1].plot([p.recall for p in ordered], [p.precision for p in ordered], "o-")
    panels[1].set(xlabel="recall", ylabel="precision")
    if distances:
        panels[2].plot([k for k, _ in distances], [value for _, value in distances], "o-")
        panels[2].set(xlabel="samples kept, %", ylabel=frechet_name)
    for panel in panels:
        panel.grid(alpha=0.3)
    _save(figure, path)


class Panel(NamedTuple):
    """Curves over steps.

    Attributes:
        title: what is drawn, with its unit.
        curves: by the names of the legend: steps and values.
        logarithmic: whether values, which are positive, are drawn by their logarithms.
        bound: a value to compare with, and its name.
    """

    title: str
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    logarithmic: bool = False
    bound: tuple[str, float] | None = None


def draw_panels(rows: Mapping[str, Sequence[Panel]], path: Path) -> None:
    """Write a PNG, whole or not: a row of panels for each run, with its name.

    Raises:
        UnavailableError: matplotlib cannot be imported.
        DiskFullError: there is no room.
    """
    require_matplotlib()
    columns = max(len(panels) for panels in rows.values())
    figure = _figure(4.2 * columns, 3.2 * len(rows))
    for part, (name, panels) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        part.suptitle(name, x=0.01, ha="left", weight="bold")
        for axes, panel in itertools.zip_longest(part.subplots(1, columns, squeeze=False)[0], panels):
            if panel is None:
                axes.set_axis_off()
                continue
            for label, (steps, values) in panel.curves.items():
                axes.plot(steps, values, "o-" if len(steps) < _FEW_POINTS else "-", markersize=3, label=label)
            if panel.bound is not None:
                axes.axhline(panel.bound[1], color="gray", linestyle=":", label=panel.bound[0])
            axes.set(xlabel="step", title=panel.title, yscale="log" if panel.logarithmic else "linear")
            axes.grid(alpha=0.3, which="both")
            if len(panel.curves) > 1 or panel.bound is not None:
                axes.legend(fontsize="small")
    with replacing_file(path) as temporary:
        _save(figure, temporary)


def _figure(width: float, height: float) -> Any:
    """A figure of its own, in inches: no global state, no display."""
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), dpi=90, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})
