"""The commands and the Python of docs/using-models.md, run as they stand, from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from fastvq.cli import main
from fastvq.data import image_grid

pytestmark = pytest.mark.usefixtures("steady")
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "using-models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = re.findall(r"\]\(using-models/(.+?)\)", PAGE)


def pictures(path: Path) -> list[np.ndarray]:
    with Image.open(path) as found:
        return [np.asarray(frame.convert("L")).astype(int) for frame in ImageSequence.Iterator(found)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which everything was run, and the names that the Python leaves."""
    folder, names = tmp_path_factory.mktemp("work"), dict[str, Any]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, code in BLOCKS:
            if kind == "python":
                exec(compile(code, "using-models.md", "exec"), names)
                continue
            for line in code.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                assert program == "fastvq"
                assert main(arguments) == 0, line
    torch.set_num_threads(threads)
    return folder, names


def test_python_gives_what_it_says(work: tuple[Path, dict[str, Any]]) -> None:
    folder, names = work
    image, mask, painted = names["image"], names["mask"], names["painted"]
    assert painted.images.shape == (10, 1, 32, 32)
    assert torch.equal(painted.images[:, :, ~mask], image[:, :, ~mask].expand(10, -1, -1))
    assert torch.equal(names["variations"].codes[0], names["top"][0].expand(10, -1, -1))
    assert names["cold"].images.shape == (20, 1, 32, 32)
    assert names["kept"].shape == image.shape
    assert names["rows"] == [4, 8, 12, 16]
    assert [bool((grid >= 0).all()) for grid in names["begun"].codes] == [True, False]
    assert [picture.size for picture in names["pictures"]] == [(32, 32)] * 4
    assert (folder / "sevens.png").is_file()
    assert bool((names["bits"] > 0).all())
    assert len(pictures(folder / "filling.gif")) == 1 + 4 + 16


@pytest.mark.parametrize(
    ("name", "samples", "columns", "captions"),
    [
        ("by-class.png", "out", 3, ["7", "3", "8"]),
        ("temperature.png", "cold", 10, [*"0123456789"]),
        ("variations.png", "variations", None, None),
        ("samples.png", "ten", 10, [*"0123456789"]),
    ],
)
def test_commands_and_python_do_the_same(
    name: str, samples: str, columns: int | None, captions: list[str] | None, work: tuple[Path, dict[str, Any]]
) -> None:
    folder, names = work
    expected = image_grid(names[samples].images, columns, captions=captions)
    assert np.array_equal(pictures(folder / name)[0], expected)


def test_the_page_shows_what_its_commands_make(work: tuple[Path, dict[str, Any]]) -> None:
    """Up to what a decoder rounds, and to a code that lay next to a boundary, on another processor."""
    assert sorted(SHOWN) == sorted(path.name for path in (DOCS / "using-models").iterdir())
    for name in SHOWN:
        made, shown = (pictures(folder / name) for folder in (work[0], DOCS / "using-models"))
        assert len(made) == len(shown)
        for mine, theirs in zip(made, shown, strict=True):
            assert mine.shape == theirs.shape
            assert np.abs(mine - theirs).mean() < 4, name
