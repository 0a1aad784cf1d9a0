"""An evaluation as plain data, and the sections of a report made of that data alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvq._html import Page
from fastvq._markdown import MarkdownPage
from fastvq.evaluation.evaluate import Evaluation
from fastvq.evaluation.rejection import CurvePoint

Numbers = Mapping[str, Any]


class Section(NamedTuple):
    """A part of a report.

    Attributes:
        note: what the table shows, as Markdown.
        header, rows: the table; names in its first column, numbers in the others.
        after: text below the table.
        picture: name of the file, and what it shows.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    after: str = ""
    picture: tuple[str, str] | None = None


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain data for JSON: everything but the pictures. Numbers that are not finite become None."""
    fields = dataclasses.fields(evaluation)
    return {f.name: _plain(getattr(evaluation, f.name)) for f in fields if f.name != "pictures"}


def add_sections(document: Page | MarkdownPage, numbers: Numbers, folder: Path | None = None) -> None:
    """Add a section for each part that was measured.

    Args:
        numbers: what :func:`to_dict` gives.
        folder: of pictures, which are shown as far as they are there.
    """
    for section in _sections(numbers):
        picture = None
        if folder is not None and section.picture is not None and (folder / section.picture[0]).is_file():
            picture = folder / section.picture[0]
        if not section.rows and picture is None:
            continue
        document.heading(section.title)
        if section.rows:
            document.text(section.note)
            document.table(section.header, section.rows, numbers=range(1, len(section.header)))
        if section.after:
            document.text(section.after)
        if section.picture is not None and picture is not None:
            shown = section.picture[1]
            document.picture(picture, shown, f"{shown[0].upper()}{shown[1:]}.")


def frechet_name(numbers: Numbers) -> str:
    """FID for Inception's features; otherwise with the name and hash of the features that it depends on."""
    return "FID" if numbers["extractor"]["is_inception"] else f"FID [{features_title(numbers)}]"


def features_title(numbers: Numbers) -> str:
    """Name and hash of the features behind the scores."""
    return str(numbers["extractor"]["title"])


def _sections(numbers: Numbers) -> list[Section]:
    found = [_codes(numbers), _images(numbers)]
    # Reports made before there was a choice do not say how classes were drawn.
    labelled = "classes by" in numbers.get("draws", {"classes by": None})
    shown = ("samples.png", "samples, a column per class" if labelled else "samples")
    if numbers["sets"] is None:
        found.append(Section("Samples", "", (), (), picture=shown))
    else:
        found.append(_sets(numbers)._replace(picture=shown))
    for name, section in (("memorisation", _memorisation), ("accuracy", _accuracy), ("curve", _curve)):
        if numbers[name] is not None:
            found.append(section(numbers))
    return found


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


def _fixed(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _spread(score: Mapping[str, float | None] | None, scale: float = 1.0) -> str:
    if score is None or score["mean"] is None or score["deviation"] is None:
        return "-"
    return f"{scale * score['mean']:.3f} ± {scale * score['deviation']:.3f}"


def _codes(numbers: Numbers) -> Section:
    training, validation = numbers["images"]["training"], numbers["images"]["validation"]
    rows = []
    for number, (seen, held) in enumerate(zip(training["levels"], validation["levels"], strict=True)):
        rows.append(
            [
                f"{number}, {seen['shape'][0]} x {seen['shape'][1]} of {seen['num_codes']}",
                f"{seen['nll']:.3f} / {held['nll']:.3f}",
                f"{seen['bits']:.3f} / {held['bits']:.3f}",
                f"{held['bits'] - seen['bits']:+.3f}",
                f"{_fixed(seen['error'], 3)} / {_fixed(held['error'], 3)}",
                f"{_percent(seen['usage'])} / {_percent(held['usage'])}",
                f"{seen['perplexity']:.1f} / {held['perplexity']:.1f}",
            ]
        )
    header = [
        "level (0: top)",
        "nats per code",
        "bits per code",
        "gap",
        "standard error",
        "codebook used",
        "perplexity",
    ]
    return Section("Codes", "Training / validation images.", header, rows)


def _images(numbers: Numbers) -> Section:
    rows = [
        [
            name,
            str(found["images"]),
            _fixed(found["mse"], 5),
            _fixed(found["psnr"], 2, " dB"),
            _fixed(found["bits_per_image"], 1),
            _fixed(found["bits_per_dimension"], 4),
            _fixed(found["code_compression"], 1, "x"),
            _fixed(found["prior_compression"], 1, "x"),
        ]
        for name, found in numbers["images"].items()
    ]
    header = [
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
    picture = ("reconstructions.png", "held-out images above, what their codes keep below")
    return Section("Images", note, header, rows, picture=picture)


_CLASSES = {
    "turn": " Samples are of all classes in turn.",
    "frequency": " Samples are of each class as often as training\nimages.",
}


def _sets(numbers: Numbers) -> Section:
    title, k = features_title(numbers), numbers["config"]["neighbours"]
    columns: list[Numbers] = list(numbers["sets"].values())

    def manifold(name: str) -> list[str]:
        return ["-" if s["manifold"] is None else _fixed(s["manifold"][name], 3) for s in columns]

    rows = [
        ["images", *(str(s["images"]) for s in columns)],
        [frechet_name(numbers), *(_fixed(s["frechet"], 3) for s in columns)],
        [f"KID x 1000 [{title}]", *(_spread(s["kernel"], 1e3) for s in columns)],
        [f"Inception score [{title}]", *(_spread(s["inception"]) for s in columns)],
        *([f"{name} [{title}]", *manifold(name)] for name in ("precision", "recall", "density", "coverage")),
    ]
    real, features = columns[0]["vectors"][0], numbers["extractor"]["features"]
    note = (
        f"Against {real} feature vectors of training images ({features} features; k = {k}). Reconstructions are the "
        "floor that the\nautoencoder sets, validation images what real images score. After ±: deviation between "
        "subsets (KID) or splits\n(Inception score). FID, recall and coverage depend on the number of images: compare "
        "columns of the same number.\nKID is unbiased, so it can be negative. -: too few images."
        + _CLASSES.get(numbers.get("draws", {}).get("classes by", ""), "")
    )
    return Section("Samples", note, ["", *numbers["sets"]], rows)


def _memorisation(numbers: Numbers) -> Section:
    rows = [
        [name, _fixed(found["median"], 3), _fixed(found["lowest_percent"], 3)]
        for name, found in numbers["memorisation"].items()
    ]
    note = (
        f"In feature space [{features_title(numbers)}]. A model that repeats its training images comes nearer to "
        "them than new images do."
    )
    picture = ("neighbours.png", "samples in the first row, the training images nearest in feature space below")
    title = "Distance to the nearest training image"
    return Section(title, note, ["", "median", "1st percentile"], rows, picture=picture)


def _accuracy(numbers: Numbers) -> Section:
    accuracy, images = numbers["accuracy"], numbers["images"]
    with_top5 = any("top5" in values for values in accuracy.values())
    rows = [
        [
            name,
            _percent(values["top1"]),
            *([_percent(values["top5"])] if with_top5 else []),
            _fixed(values["nll"], 3),
        ]
        for name, values in accuracy.items()
    ]
    header = ["classifier trained on", "top-1", *(["top-5"] if with_top5 else []), "nats per image"]
    validation, training = images["validation"]["images"], images["training"]["images"]
    note = f"Of {validation} validation images; {training} images to train on each."
    return Section("Classification accuracy score", note, header, rows)


def _curve(numbers: Numbers) -> Section:
    title, points = features_title(numbers), [CurvePoint(**point) for point in numbers["curve"]]
    rows = [
        [
            f"{100 * point.keep:g} %",
            _fixed(point.least_score, 4),
            _fixed(point.frechet, 3),
            *(_fixed(value, 3) for value in (point.precision, point.recall, point.density, point.coverage)),
        ]
        for point in points
    ]
    header = ["kept", "lowest score", frechet_name(numbers), "precision", "recall", "density", "coverage"]
    same = (
        " Features and rejection come from the same network, which flatters the scores."
        if numbers["classifier"] == title
        else ""
    )
    note = (
        f"Of each class the samples kept that [{numbers['classifier']}] recognises best; features of "
        f"[{title}].{same}\nEvery row counts {points[0].samples} samples, so that rows "
        "compare (with other sets of another size they do not)."
    )
    picture = ("curve.png", "scores by the fraction of samples kept")
    return Section("Rejection sampling", note, header, rows, _trend(points) if len(rows) > 1 else "", picture)


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
