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
    """Write a PNG: precision and recall, and the Fréchet distance, against the fraction kept.

    Args:
        features: title of the extractor that all scores depend on.
    """
    require_matplotlib()
    ordered = sorted(points, key=lambda point: point.keep)
    kept = [100 * point.keep for point in ordered]
    # A figure of its own: no global state, no display.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 3.4), dpi=90, layout="constrained")
    figure.suptitle(f"features: {features}", fontsize="medium")
    panels = figure.subplots(1, 3)
    panels[0].plot(kept, [p.precision for p in ordered], "o-", label="precision")
    panels[0].plot(kept, [p.recall for p in ordered], "s-", label="recall")
    panels[0].plot(kept, [p.coverage for p in ordered], "^--", label="coverage")
    panels[0].legend()
    panels[1].plot([p.recall for p in ordered], [p.precision for p in ordered], "o-")
    panels[1].set(xlabel="recall", ylabel="precision")
    known = [(k, p.frechet) for k, p in zip(kept, ordered, strict=True) if p.frechet is not None]
    panels[2].plot([k for k, _ in known], [value for _, value in known], "o-")
    panels[2].set(ylabel=frechet_name)
    for panel in (panels[0], panels[2]):
        panel.set(xlabel="samples kept, %")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, format="png", metadata={"Software": None})
