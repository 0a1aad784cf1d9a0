"""An evaluation as Markdown tables and as plain data."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from fastvq.evaluation.evaluate import Evaluation
from fastvq.evaluation.rejection import CurvePoint
from fastvq.evaluation.scores import Score
from fastvq.evaluation.statistics import SetScores


def tables(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Title and Markdown text of each part that was measured."""
    parts = [("Codes", _codes(evaluation)), ("Images", _images(evaluation))]
    if evaluation.sets is not None:
        parts.append(("Samples", _sets(evaluation)))
    if evaluation.memorisation is not None:
        parts.append(("Distance to the nearest training image", _memorisation(evaluation)))
    if evaluation.accuracy is not None:
        parts.append(("Classification accuracy score", _accuracy(evaluation)))
    if evaluation.curve is not None:
        parts.append(("Rejection sampling", _curve(evaluation)))
    return parts


def frechet_name(evaluation: Evaluation) -> str:
    """FID for Inception's features; otherwise with the name and hash of the features that it depends on."""
    return "FID" if _extractor(evaluation)["is_inception"] else f"FID [{features_title(evaluation)}]"


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain data for JSON: everything but the pictures. Numbers that are not finite become None."""
    fields = dataclasses.fields(evaluation)
    return {f.name: _plain(getattr(evaluation, f.name)) for f in fields if f.name != "pictures"}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _extractor(evaluation: Evaluation) -> dict[str, Any]:
    assert evaluation.extractor is not None
    return evaluation.extractor


def features_title(evaluation: Evaluation) -> str:
    """Name and hash of the features behind the scores."""
    return str(_extractor(evaluation)["title"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, padded so that it also reads as text."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _spread(score: Score | None, scale: float = 1.0) -> str:
    return "-" if score is None else f"{scale * score.mean:.3f} ± {scale * score.deviation:.3f}"


def _codes(evaluation: Evaluation) -> str:
    training, validation = evaluation.images["training"], evaluation.images["validation"]
    rows = []
    for number, (seen, held) in enumerate(zip(training.levels, validation.levels, strict=True)):
        rows.append(
            [
                f"{number}, {seen.shape[0]} x {seen.shape[1]} of {seen.num_codes}",
                f"{seen.nll:.3f} / {held.nll:.3f}",
                f"{seen.bits:.3f} / {held.bits:.3f}",
                f"{held.bits - seen.bits:+.3f}",
                f"{seen.error:.3f} / {held.error:.3f}",
                f"{100 * seen.usage:.1f} % / {100 * held.usage:.1f} %",
                f"{seen.perplexity:.1f} / {held.perplexity:.1f}",
            ]
        )
    head = ["level (0: top)", "nats per code", "bits per code", "gap", "standard error", "codebook used", "perplexity"]
    return "Training / validation images.\n\n" + _table(head, rows)


def _images(evaluation: Evaluation) -> str:
    rows = []
    for name, found in evaluation.images.items():
        rows.append(
            [
                name,
                str(found.images),
                f"{found.mse:.5f}",
                f"{found.psnr:.2f} dB",
                f"{found.bits_per_image:.1f}",
                f"{found.bits_per_dimension:.4f}",
                f"{found.code_compression:.1f}x",
                f"{found.prior_compression:.1f}x",
            ]
        )
    head = [
        "images",
        "n",
        "MSE in [-1, 1]",
        "PSNR",
        "bits per image",
        "bits per dimension",
        "smaller as codes",
        "smaller under the priors",
    ]
    note = (
        "Bits are those of the codes under the priors, a dimension is one channel of one pixel; the code is lossy, so "
        "this is no likelihood\nof pixels. Smaller: against 8-bit pixels."
    )
    return f"{note}\n\n{_table(head, rows)}"


_CLASSES = {
    "turn": " Samples are of all classes in turn.",
    "frequency": " Samples are of each class as often as training\nimages.",
}


def _sets(evaluation: Evaluation) -> str:
    assert evaluation.sets is not None
    title, k = features_title(evaluation), evaluation.config.neighbours
    features = _extractor(evaluation)["features"]

    def manifold(name: str) -> list[str]:
        return ["-" if s.manifold is None else f"{getattr(s.manifold, name):.3f}" for s in columns]

    columns: list[SetScores] = list(evaluation.sets.values())
    rows = [
        ["images", *(str(s.images) for s in columns)],
        [frechet_name(evaluation), *("-" if s.frechet is None else f"{s.frechet:.3f}" for s in columns)],
        [
            f"KID x 1000 [{title}]",
            *(_spread(s.kernel, 1e3) for s in columns),
        ],
        [
            f"Inception score [{title}]",
            *(_spread(s.inception) for s in columns),
        ],
        *([f"{name} [{title}]", *manifold(name)] for name in ("precision", "recall", "density", "coverage")),
    ]
    real = columns[0].vectors[0]
    note = (
        f"Against {real} feature vectors of training images ({features} features; k = {k}). Reconstructions are the "
        "floor that the\nautoencoder sets, validation images what real images score. After ±: deviation between "
        "subsets (KID) or splits\n(Inception score). FID, recall and coverage depend on the number of images: compare "
        "columns of the same number.\nKID is unbiased, so it can be negative. -: too few images."
        + _CLASSES.get(evaluation.draws.get("classes by", ""), "")
    )
    return f"{note}\n\n{_table(['', *evaluation.sets], rows)}"


def _memorisation(evaluation: Evaluation) -> str:
    assert evaluation.memorisation is not None
    rows = [[name, f"{m.median:.3f}", f"{m.lowest_percent:.3f}"] for name, m in evaluation.memorisation.items()]
    note = (
        f"In feature space [{features_title(evaluation)}]. A model that repeats its training images comes nearer to "
        "them than new images do."
    )
    return f"{note}\n\n{_table(['', 'median', '1st percentile'], rows)}"


def _accuracy(evaluation: Evaluation) -> str:
    assert evaluation.accuracy is not None
    with_top5 = any("top5" in values for values in evaluation.accuracy.values())
    rows = [
        [
            name,
            f"{100 * values['top1']:.1f} %",
            *([f"{100 * values['top5']:.1f} %"] if with_top5 else []),
            f"{values['nll']:.3f}",
        ]
        for name, values in evaluation.accuracy.items()
    ]
    head = ["classifier trained on", "top-1", *(["top-5"] if with_top5 else []), "nats per image"]
    validation = evaluation.images["validation"].images
    training = evaluation.images["training"].images
    return f"Of {validation} validation images; {training} images to train on each.\n\n{_table(head, rows)}"


def _trend(points: Sequence[CurvePoint]) -> str:
    """How precision and recall change as less is kept, and how many steps go the other way."""
    ordered = sorted(points, key=lambda point: -point.keep)
    parts = [_change(name, [getattr(point, name) for point in ordered]) for name in ("precision", "recall")]
    return f"As less is kept, {' and '.join(parts)}."


def _change(name: str, values: Sequence[float]) -> str:
    first, last = values[0], values[-1]
    if f"{first:.3f}" == f"{last:.3f}":
        low, high = min(values), max(values)
        between = "" if f"{low:.3f}" == f"{high:.3f}" else f" (between {low:.3f} and {high:.3f})"
        return f"{name} is {last:.3f} in the end as at first{between}"
    rises = last > first
    steps = [b - a if rises else a - b for a, b in itertools.pairwise(values)]
    against = [-step for step in steps if step < 0]
    worst = f", by at most {max(against):.3f}" if against else ""
    direction = "rises" if rises else "falls"
    return f"{name} {direction} from {first:.3f} to {last:.3f} ({len(against)} of {len(steps)} steps against it{worst})"


def _curve(evaluation: Evaluation) -> str:
    assert evaluation.curve is not None
    rows = [
        [
            f"{100 * point.keep:g} %",
            f"{point.least_score:.4f}",
            "-" if point.frechet is None else f"{point.frechet:.3f}",
            *(f"{value:.3f}" for value in (point.precision, point.recall, point.density, point.coverage)),
        ]
        for point in evaluation.curve
    ]
    head = ["kept", "lowest score", frechet_name(evaluation), "precision", "recall", "density", "coverage"]
    same = (
        " Features and rejection come from the same network, which flatters the scores."
        if evaluation.classifier == features_title(evaluation)
        else ""
    )
    note = (
        f"Of each class the samples kept that [{evaluation.classifier}] recognises best; features of "
        f"[{features_title(evaluation)}].{same}\nEvery row counts {evaluation.curve[0].samples} samples, so that rows "
        "compare (with other sets of another size they do not)."
    )
    trend = f"\n\n{_trend(evaluation.curve)}" if len(rows) > 1 else ""
    return f"{note}\n\n{_table(head, rows)}{trend}"
