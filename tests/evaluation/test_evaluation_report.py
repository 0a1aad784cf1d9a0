"""Reports: the same page as Markdown and as HTML, both made of the numbers that are stored."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import Flatten, Images, Ripples, all_grids, readable_pipeline

from fastvq._markdown import MarkdownPage
from fastvq.errors import CorruptFileError, MissingFileError
from fastvq.evaluation import Evaluation, EvaluationConfig, evaluate, render_report, write_report

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHIPPED = ("digits-report", "emoji-report")


class Cells(HTMLParser):
    """Tables of a page as rows of cells, and the sources of its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.sources: list[str] = []
        self.headings: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2"):
            self.headings.append("")
        elif tag == "img":
            self.sources.append(str(dict(attrs)["src"]))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("th", "td"):
            self.tables[-1][-1][-1] += data
        elif self._inside in ("h1", "h2"):
            self.headings[-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    lines = [[line for line in table.splitlines() if not line.startswith("|--")] for table in tables]
    return [[[cell.strip() for cell in line[1:-1].split(" | ")] for line in table] for table in lines]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    grids = all_grids()
    data = Images(grids, torch.arange(len(grids)) % 2)
    rows, config = np.arange(len(grids)), EvaluationConfig(samples=24, fractions=(1.0, 0.5), keep=50)
    parts = (readable_pipeline(2), data, rows[40:], rows[:40], config)
    return evaluate(*parts, extractor=Flatten(), classifier=Ripples(2))


@pytest.fixture(scope="module")
def report(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(evaluation, tmp_path_factory.mktemp("reports") / "one", title="A <title>", curves=False)


def test_both_forms_say_the_same(report: Path) -> None:
    markdown = (report / "README.md").read_text(encoding="utf-8")
    page = Cells((report / "report.html").read_text(encoding="utf-8"))
    assert page.tables == markdown_tables(markdown)
    assert page.headings == re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    assert "![samples, a column per class](samples.png)" in markdown
    names = re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert names == ["reconstructions.png", "samples.png", "neighbours.png"]
    inside = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    assert inside == [(report / name).read_bytes() for name in names]


def test_a_report_says_what_was_measured(report: Path, evaluation: Evaluation) -> None:
    codes, images, sets, nearest, curve = markdown_tables((report / "README.md").read_text(encoding="utf-8"))
    training, validation = (evaluation.images[name] for name in ("training", "validation"))
    assert codes[1][:2] == ["0, 1 x 1 of 3", f"{training.levels[0].nll:.3f} / {validation.levels[0].nll:.3f}"]
    assert images[2][:3] == ["validation", "40", f"{validation.mse:.5f}"]
    assert evaluation.sets is not None
    assert evaluation.curve is not None
    assert sets[0] == ["", *evaluation.sets]
    assert sets[1] == ["images", "24", "203", "40", "40"]
    assert [row[0] for row in nearest[1:]] == ["samples", "validation images"]
    assert [row[0] for row in curve[1:]] == ["100 %", "50 %"]
    assert curve[2][3] == f"{evaluation.curve[1].precision:.3f}"


def test_pages_are_made_again_from_what_is_stored(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(report, folder)
    for name in ("README.md", "report.html"):
        (folder / name).unlink()
    assert render_report(folder) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in report.iterdir()
    }
    render_report(folder, title="Another")
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("# Another\n")
    assert "<h1>Another</h1>" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_picture_that_is_gone_is_left_out(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(report, folder)
    (folder / "neighbours.png").unlink()
    render_report(folder)
    assert "neighbours.png" not in (folder / "README.md").read_text(encoding="utf-8")
    assert len(Cells((folder / "report.html").read_text(encoding="utf-8")).sources) == 2


def test_without_features_there_are_pictures_and_no_scores(tmp_path: Path) -> None:
    grids = all_grids()
    rows = np.arange(len(grids))
    found = evaluate(readable_pipeline(), Images(grids), rows[40:], rows[:40], EvaluationConfig(samples=24))
    write_report(found, tmp_path / "report", title="Codes alone")
    page = Cells((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.headings == ["Codes alone", "Codes", "Images", "Samples"]
    assert len(page.sources) == len(page.tables) == 2
    # Without classes there are no columns of them.
    assert (tmp_path / "report" / "README.md").read_text(encoding="utf-8").endswith("(samples.png)\n\n*Samples.*\n")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_reports_are_what_their_numbers_give(name: str, tmp_path: Path) -> None:
    shutil.copytree(DOCS / name, tmp_path / name)
    render_report(tmp_path / name)
    for page in ("README.md", "report.html"):
        assert (tmp_path / name / page).read_bytes() == (DOCS / name / page).read_bytes(), page
    assert (DOCS / name / "report.html").stat().st_size < 2_000_000


def test_numbers_that_are_no_report_change_nothing(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    with pytest.raises(MissingFileError, match="evaluation.json: no such file"):
        render_report(folder)
    shutil.copytree(report, folder)
    numbers = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    del numbers["images"]["training"]
    (folder / "evaluation.json").write_text(json.dumps(numbers), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CorruptFileError, match="evaluation.json: not the numbers of a report"):
        render_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_numbers_that_are_not_finite_are_dashes(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(report, folder)
    numbers = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    numbers["images"]["training"]["psnr"] = None
    numbers["images"]["validation"]["levels"][0]["error"] = None
    (folder / "evaluation.json").write_text(json.dumps(numbers), encoding="utf-8")
    render_report(folder)
    codes, images, *_ = markdown_tables((folder / "README.md").read_text(encoding="utf-8"))
    assert images[1][3] == "-"
    assert codes[1][4].endswith(" / -")


def test_markdown_of_a_page() -> None:
    page = MarkdownPage("Title")
    page.heading("Section")
    page.text("Words.")
    page.table(["a", "b"], [["x|y", 10], ["z", 2]], numbers=[1])
    page.picture(Path("folder/p.png"), "what it shows", "What it shows.")
    assert page.markdown() == (
        "# Title\n\n## Section\n\nWords.\n\n"
        "| a    | b  |\n|------|----|\n| x\\|y | 10 |\n| z    | 2  |\n\n"
        "![what it shows](p.png)\n\n*What it shows.*\n"
    )
