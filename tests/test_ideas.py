"""The pictures of docs/ideas: what they say is what the package computes, and they are those that the script draws."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from fastvq import PixelSNAIL
from fastvq.models.blocks import CausalConv2d
from fastvq.sampling import EngineOptions, describe
from fastvq.sampling.plan import Front, compile_plan

pytestmark = pytest.mark.usefixtures("steady")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
IDEAS = ROOT / "docs" / "ideas"
PARTS = [path.stem for path in sorted((IDEAS / "drawing").glob("*.py")) if path.stem != "__init__"]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(IDEAS.glob("*.md"))}
LARGEST = {".png": 150_000, ".gif": 400_000}


@pytest.fixture(scope="module")
def imported() -> Iterator[dict[str, ModuleType]]:
    """The script and what it imports, as they are found where the script is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(IDEAS))
        yield {name: importlib.import_module(name) for name in ("draw", *(f"drawing.{part}" for part in PARTS))}


@pytest.fixture
def front(imported: dict[str, ModuleType]) -> ModuleType:
    return imported["drawing.front"]


def test_numbers_of_the_front_are_those_of_the_engines(front: ModuleType) -> None:
    prior = front.example(front.SHOWN)
    scheduled = describe(prior, options=EngineOptions(tile=1), engine="torch").schedule.front
    assert scheduled == compile_plan(prior).front(1) == Front(front.SHOWN, 3, 1)
    assert front.numbers(scheduled) == {(r, c): c + 3 * r for r in range(8) for c in range(12)}
    assert list(front.raster_numbers((3, 4)).values()) == list(range(12))


def test_a_code_depends_on_what_is_shown(front: ModuleType) -> None:
    """A code whose vectors are NaN, at each place in turn, shows in the logits that depend on it and in no others."""
    shape = (6, 7)
    prior = front.example(shape).double().eval()
    codes = torch.eye(shape[0] * shape[1], dtype=torch.long).unflatten(1, shape)
    with torch.no_grad():
        prior.input.weight[:, 1] = torch.nan
        moved = prior(codes).isnan().any(1)  # [place of the code, H, W]
    step = front.numbers(compile_plan(prior).front(1))
    for row, column in step:
        changed = moved[:, row, column].nonzero().squeeze(1)
        found = {divmod(int(place), shape[1]) for place in changed}
        assert found == front.reach(prior, (row, column))
        assert all(step[place] < step[row, column] for place in found)
        assert front.direct(prior, (row, column)) <= found


def test_counts_are_those_of_explain(imported: dict[str, ModuleType]) -> None:
    cached = imported["drawing.cached"]
    prior = cached.shipped()
    found, explained = cached.counts(prior), describe(prior)
    assert found.naive_total == explained.naive_flops
    assert found.cached_total == explained.row_flops + explained.step_flops
    height, width = found.shape
    assert [len(row) for row in found.naive] == [width] * height
    assert [row[0] // found.naive[0][0] for row in found.naive] == list(range(1, height + 1))
    # The picture's layers are the network's: only those that read other positions have a share in the row phase.
    causal = [module for module in prior.modules() if isinstance(module, CausalConv2d)]
    assert 2 * (sum(found.layers) - 1) == len(causal)
    assert round(found.naive_total / found.cached_total) == 136


def test_bytes_are_those_of_tensors(imported: dict[str, ModuleType]) -> None:
    quantiser = imported["drawing.quantiser"]
    n, k, d = 12, 5, 3
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    scores = codebook.square().sum(1) / 2 - x @ codebook.T
    indices = scores.argmin(1)
    one_hot = torch.nn.functional.one_hot(indices, k).float()
    sums = one_hot.T @ x
    assert quantiser.by_matrix(n, k, d) == {
        "product": x.nbytes + codebook.nbytes + scores.nbytes,
        "least": scores.nbytes + indices.nbytes,
        "one-hot": indices.nbytes + one_hot.nbytes,
        "sums": one_hot.nbytes + x.nbytes + sums.nbytes,
    }
    assigned, order = indices.int(), indices.argsort()
    assert quantiser.in_one_pass(n, k, d) == {
        "search": x.nbytes + codebook.nbytes + indices.nbytes + assigned.nbytes,
        "sums": 2 * assigned.nbytes + 2 * order.nbytes + x.nbytes + sums.nbytes,
    }


@pytest.mark.parametrize(("kernels", "tile"), [("avx512", (32, 12)), ("avx2", (16, 6))])
def test_tiles_are_those_of_the_kernel(kernels: str, tile: tuple[int, int], imported: dict[str, ModuleType]) -> None:
    source = (ROOT / "csrc" / "cpu" / f"kernels_{kernels}.cpp").read_text()
    lanes, rows = (int(re.search(rf"FASTVQ_{name} (\d+)", source)[1]) for name in ("LANES", "ROWS"))  # type: ignore[index]
    vectors = re.search(r"kTileVectors = (\d+)", (ROOT / "csrc" / "cpu" / "vectors.h").read_text())
    assert vectors is not None
    assert (lanes * int(vectors[1]), rows) == tile
    page = " ".join(PAGES["fused-quantiser.md"].split())
    assert "products of 32 vectors with 12 codes (AVX-512; 16 with 6 under AVX2)" in page
    assert imported["drawing.quantiser"].TILE == (32, 12)


def test_the_table_of_tiles() -> None:
    rows = {
        title.strip(): [int(cell) for cell in cells.strip("| ").split("|")]
        for title, cells in re.findall(r"^\| ([\w ]+?) \|((?: \d+ \|)+)$", PAGES["wavefront.md"], re.MULTILINE)
    }
    fronts = [Front((64, 64), 3, tile) for tile in rows["T"]]
    assert rows["tile steps"] == [front.steps for front in fronts]
    assert rows["dependent steps"] == [front.dependent_steps for front in fronts]
    assert len(fronts) == 5


def test_levels_of_strict_and_inclusive_priors() -> None:
    """What the page says its code prints."""
    common = {"shape": (16, 16), "num_codes": 64, "channels": 16, "residual_channels": 16, "attention": False}
    levels = [describe(PixelSNAIL(**common, mask=mask)).levels for mask in ("strict", "inclusive")]
    assert "strict {}, inclusive {}".format(*levels) in PAGES["cached-sampling.md"]


def pictures(path: Path) -> list[np.ndarray]:
    with Image.open(path) as found:
        return [np.asarray(frame.convert("L")).astype(int) for frame in ImageSequence.Iterator(found)]


def test_pages_show_what_the_script_draws(tmp_path: Path, imported: dict[str, ModuleType]) -> None:
    """Up to what other versions of matplotlib and Pillow make of letters."""
    shown = {name for page in PAGES.values() for name in re.findall(r"\]\(([\w-]+\.(?:png|gif))\)", page)}
    assert shown == {path.name for path in IDEAS.iterdir() if path.suffix in LARGEST} == set(imported["draw"].PICTURES)
    assert imported["draw"].main(["--out", str(tmp_path)]) == 0
    for name in shown:
        mine, theirs = pictures(tmp_path / name), pictures(IDEAS / name)
        assert [frame.shape for frame in mine] == [frame.shape for frame in theirs], name
        assert max(np.abs(a - b).mean() for a, b in zip(mine, theirs, strict=True)) < 4, name
        assert (IDEAS / name).stat().st_size < LARGEST[Path(name).suffix], name
    assert len(pictures(IDEAS / "wavefront.gif")) == 1 + 12 * 16


def test_other_names_are_refused(imported: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        imported["draw"].main(["front.png"])
    assert "got 'front.png'" in capsys.readouterr().err
