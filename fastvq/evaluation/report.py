"""An evaluation as a folder: ``README.md``, pictures, and the numbers as JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastvq._files import remove_leftovers, replacing_folder, write_json
from fastvq._version import __version__
from fastvq.data.grid import save_grid
from fastvq.errors import FileConflictError
from fastvq.evaluation.curves import draw_curve, require_matplotlib
from fastvq.evaluation.evaluate import Evaluation, Pictures
from fastvq.evaluation.tables import features_title, frechet_name, tables, to_dict

PAGE, NUMBERS, CURVE = "README.md", "evaluation.json", "curve.json"


def check_report(folder: str | os.PathLike[str], *, overwrite: bool = False, curves: bool = True) -> None:
    """Find out that a report cannot be written before measuring anything.

    Raises:
        FileConflictError: the folder is not empty and ``overwrite`` is False, or it holds something else than a report.
        UnavailableError: ``curves`` without matplotlib.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    if folder.exists() and not folder.is_dir():
        raise FileConflictError(f"out: {folder} is a file and stays as it is")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileConflictError(f"out: {folder} is not empty; overwrite it or choose another name")
        if not (folder / NUMBERS).is_file():
            raise FileConflictError(f"out: {folder} holds other things than a report and stays as it is")
    if curves:
        require_matplotlib(", or leave the picture out (--no-curves)")


def write_report(
    evaluation: Evaluation,
    folder: str | os.PathLike[str],
    *,
    title: str,
    curves: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a report, whole or not at all; returns the folder.

    Args:
        title: heading of the page.
        curves: draw the rejection curve as a picture, which needs matplotlib; its numbers are written either way.

    Raises:
        as :func:`check_report`.
    """
    folder = Path(folder)
    check_report(folder, overwrite=overwrite, curves=curves and evaluation.curve is not None)
    with replacing_folder(folder, overwrite=overwrite) as temporary:
        _write_pictures(evaluation.pictures, temporary)
        if evaluation.curve is not None:
            write_json(temporary / CURVE, {"points": to_dict(evaluation)["curve"]})
            if curves:
                path, features = temporary / "curve.png", features_title(evaluation)
                draw_curve(evaluation.curve, path, frechet_name=frechet_name(evaluation), features=features)
        write_json(temporary / NUMBERS, {"environment": environment(), **to_dict(evaluation)})
        page = _page(evaluation, title, curves)
        (temporary / PAGE).write_text(page, encoding="utf-8")
    return folder


def environment() -> dict[str, str]:
    """Processor, versions and date."""
    versions = {"fastvq": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", "scikit-learn", "matplotlib"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "gpu": device,
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _write_pictures(pictures: Pictures, folder: Path) -> None:
    originals = pictures.originals
    pairs = torch.cat([originals, pictures.reconstructions])
    save_grid(folder / "reconstructions.png", pairs, len(originals))
    save_grid(folder / "samples.png", pictures.samples, pictures.classes)
    if pictures.queries is not None and pictures.neighbours is not None:
        # A column per sample: the sample on top, its neighbours below.
        columns = torch.cat([pictures.queries[:, None], pictures.neighbours], dim=1)
        save_grid(folder / "neighbours.png", columns.transpose(0, 1).flatten(0, 1), len(columns))


def _page(evaluation: Evaluation, title: str, curves: bool) -> str:
    config = evaluation.config
    temperature = ", ".join(f"{value:g}" for value in config.temperature)
    facts = ", ".join(f"{name} {value}" for name, value in environment().items() if value != "none")
    seconds = ", ".join(f"{name} {value.processor:.1f} s" for name, value in evaluation.seconds.items())
    wall = sum(value.wall for value in evaluation.seconds.values())
    lines = [f"# {title}", ""]
    told = ("temperature", "classes by")  # here, and beside the scores
    more = "".join(f", {name} {value}" for name, value in evaluation.draws.items() if name not in told)
    what = f"{config.samples} samples at temperature {temperature}{more}, seed {config.seed}. "
    what = what if evaluation.sets else ""
    lines += [f"{what}{facts}.", "", f"Processor time: {seconds}. Wall-clock time: {wall:.0f} s.", ""]
    captions = {
        "Images": ("reconstructions.png", "held-out images above, what their codes keep below"),
        "Samples": ("samples.png", "samples, a column per class"),
        "Distance to the nearest training image": (
            "neighbours.png",
            "samples in the first row, the training images nearest in feature space below",
        ),
        "Rejection sampling": ("curve.png", "scores by the fraction of samples kept"),
    }
    for heading, text in tables(evaluation):
        lines += [f"## {heading}", "", text, ""]
        if heading in captions and (heading != "Rejection sampling" or curves):
            name, caption = captions[heading]
            lines += [f"![{caption}]({name})", "", f"*{caption[0].upper()}{caption[1:]}.*", ""]
    if evaluation.sets is None:
        lines += ["## Samples", "", "![samples](samples.png)", ""]
    return "\n".join(lines)
