"""An evaluation as a folder: two forms of one page, pictures, and the numbers as JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastvq._files import read_json, reading, remove_leftovers, replacing_folder, write_json
from fastvq._html import Page
from fastvq._markdown import MarkdownPage
from fastvq._version import __version__
from fastvq.data.grid import save_grid
from fastvq.errors import FileConflictError
from fastvq.evaluation.curves import draw_curve, require_matplotlib
from fastvq.evaluation.evaluate import Evaluation, Pictures
from fastvq.evaluation.tables import Numbers, add_sections, features_title, frechet_name, to_dict

MARKDOWN, HTML, NUMBERS, CURVE = "README.md", "report.html", "evaluation.json", "curve.json"


def check_report(folder: str | os.PathLike[str], *, overwrite: bool = False, curves: bool = True) -> None:
    """Find out that a report cannot be written before measuring anything.

    Args:
        folder: where :func:`write_report` is to put it.
        overwrite: whether an earlier report there may be replaced.
        curves: whether the rejection curve is to be drawn, which needs matplotlib.

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

    It holds the same page twice, as ``README.md`` beside its pictures and as ``report.html`` with the pictures inside,
    and the numbers as ``evaluation.json`` and ``curve.json``.

    Args:
        evaluation: what :func:`evaluate` found.
        folder: a new or an empty one.
        title: heading of the page.
        curves: draw the rejection curve as a picture, which needs matplotlib; its numbers are written either way.
        overwrite: replace an earlier report there.

    Raises:
        FileConflictError, UnavailableError: as :func:`check_report`.
        DiskFullError: there is no room; what was there stays.
    """
    folder = Path(folder)
    check_report(folder, overwrite=overwrite, curves=curves and evaluation.curve is not None)
    numbers = {"title": title, "environment": environment(), **to_dict(evaluation)}
    with replacing_folder(folder, overwrite=overwrite) as temporary:
        _write_pictures(evaluation.pictures, temporary)
        if evaluation.curve is not None:
            write_json(temporary / CURVE, {"points": numbers["curve"]})
            if curves:
                path, features = temporary / "curve.png", features_title(numbers)
                draw_curve(evaluation.curve, path, frechet_name=frechet_name(numbers), features=features)
        write_json(temporary / NUMBERS, numbers)
        for name, page in _pages(title, numbers, temporary).items():
            page.save(temporary / name)
    return folder


def render_report(folder: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write both forms of a report's page anew from its ``evaluation.json`` and pictures; returns the folder.

    Nothing is measured, and no other file is changed.

    Args:
        folder: what :func:`write_report` wrote.
        title: another heading for this time. By default the report's own; of reports that do not store it, the first
            line of ``README.md``.

    Raises:
        MissingFileError: no ``evaluation.json`` in the folder.
        CorruptFileError: it does not hold the numbers of a report.
        DiskFullError: there is no room; the page is as it was.
    """
    folder = Path(folder)
    numbers = read_json(folder / NUMBERS)
    if title is None:
        title = str(numbers.get("title") or _written_title(folder / MARKDOWN) or folder.resolve().name)
    with reading(f"{folder / NUMBERS}: not the numbers of a report"):
        pages = _pages(title, numbers, folder)
    for name, page in pages.items():
        page.save(folder / name)
    return folder


def _written_title(path: Path) -> str:
    """Heading of a page of Markdown; nothing where there is none."""
    if not path.is_file():
        return ""
    first, _, _ = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    return first.removeprefix("# ").strip() if first.startswith("# ") else ""


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


def _pages(title: str, numbers: Numbers, folder: Path) -> dict[str, Page | MarkdownPage]:
    """Both forms of the page by the names of their files; pictures are those in the folder."""
    pages: dict[str, Page | MarkdownPage] = {MARKDOWN: MarkdownPage(title), HTML: Page(title)}
    for page in pages.values():
        page.text(_drawn(numbers))
        page.text(_durations(numbers))
        add_sections(page, numbers, folder)
    return pages


def _drawn(numbers: Numbers) -> str:
    """How many samples, drawn how, and by which versions on what."""
    config, what = numbers["config"], ""
    if numbers["sets"] is not None:
        temperature = ", ".join(f"{value:g}" for value in config["temperature"])
        told = ("temperature", "classes by")  # here, and beside the scores
        more = "".join(f", {name} {value}" for name, value in numbers.get("draws", {}).items() if name not in told)
        what = f"{config['samples']} samples at temperature {temperature}{more}, seed {config['seed']}. "
    facts = ", ".join(f"{name} {value}" for name, value in numbers["environment"].items() if value != "none")
    return f"{what}{facts}."


def _durations(numbers: Numbers) -> str:
    seconds = ", ".join(f"{name} {value['processor']:.1f} s" for name, value in numbers["seconds"].items())
    wall = sum(value["wall"] for value in numbers["seconds"].values())
    return f"Processor time: {seconds}. Wall-clock time: {wall:.0f} s."
