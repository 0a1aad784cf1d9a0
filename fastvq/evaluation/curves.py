"""The rejection curve as a picture; the only place that needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from fastvq.errors import UnavailableError
from fastvq.evaluation.rejection import CurvePoint


def require_matplotlib() -> None:
    """
    Raises:
        UnavailableError: matplotlib cannot be imported.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UnavailableError(
            f'the curves are drawn by matplotlib, which cannot be imported ({error}); pip install "fastvq[eval]", '
            "or leave the picture out (--no-curves)"
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
    # A figure of its own: no global state, no display.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(10 * count / 3, 3.4), dpi=90, layout="constrained")
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
    figure.savefig(path, format="png", metadata={"Software": None})
