"""What is made of recorded results: which run counts, tables, pictures, and that the pages hold what the files give."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import figures, pages, recorded, tables
from bench.drawing import Panel, Picture, Point, Series, draw, is_current
from bench.harness import Memory
from bench.machine import ROOT
from bench.made_up import BAD, NARROW_SETS, entry, result, run
from bench.pages import MarkerError, link_from, refresh, replaced
from bench.recorded import GPU, MACHINES, NARROW, RESULTS, WIDE, Recorded, Run, best_rival, ours


def test_pages_and_pictures_hold_what_the_files_give() -> None:
    assert refresh(ROOT, recorded.recorded(), check=True) == [], "python -m bench.pages"


def test_machines_of_all_recorded_files_are_shown() -> None:
    assert set(recorded.recorded().machines) == set(MACHINES)


def test_what_is_left_out_is_there() -> None:
    assert [name for name in recorded.LEFT_OUT if not (RESULTS / name).is_file()] == []


def test_every_claim_has_a_result_and_its_peer() -> None:
    found = recorded.recorded()
    for claim in recorded.CLAIMS:
        there = [found.find(machine, claim.operation, claim.case, claim.batch) for machine in claim.machines]
        assert any(there), claim


class TestWhichRunCounts:
    def test_the_newest(self) -> None:
        old = run("old", result(entry("cpu", 2.0), entry("naive", 4.0)), date="2026-01-01T00:00:00+00:00")
        new = run("new", result(entry("cpu", 1.0), entry("naive", 4.0)), date="2026-01-02T00:00:00+00:00")
        assert self.chosen(new, old) == "new"

    def test_not_one_without_a_peer_that_is_wanted(self) -> None:
        old = run("old", result(entry("cpu", 2.0), entry("naive", 4.0)), date="2026-01-01T00:00:00+00:00")
        new = run("new", result(entry("cpu", 1.0)), date="2026-01-02T00:00:00+00:00")
        assert self.chosen(old, new) == "old"
        # Where nobody measured the others the newest counts.
        assert self.chosen(run("older", result(entry("cpu", 3.0)), date="2025"), new) == "new"

    def test_with_changes_only_where_there_is_no_other(self) -> None:
        clean = run("clean", result(entry("cpu", 2.0)), date="2026-01-01T00:00:00+00:00")
        dirty = run("dirty", result(entry("cpu", 1.0)), date="2026-01-02T00:00:00+00:00", dirty=True)
        assert self.chosen(clean, dirty) == "clean"
        assert self.chosen(dirty) == "dirty"
        assert dirty.commit == "abcdef01 with changes"

    def test_a_failed_check_is_not_hidden_by_an_older_run(self) -> None:
        old = run("old", result(entry("cpu", 2.0), entry("naive", 4.0)), date="2026-01-01T00:00:00+00:00")
        new = run("new", result(entry("cpu", 1.0, check=BAD), entry("naive", 4.0)), date="2026-01-02T00:00:00+00:00")
        assert self.chosen(old, new) == "new"

    def test_beside_an_earlier_checkout_stands_for_itself(self) -> None:
        alone = run("alone", result(entry("cpu", 2.0)), date="2026-01-01T00:00:00+00:00")
        beside = run("beside", result(entry("cpu", 1.0), entry("before", 3.0)), date="2026-01-02T00:00:00+00:00")
        found = Recorded([alone, beside]).of(WIDE)
        assert {key[0]: one.run.name for key, one in found.items()} == {
            "sampling": "alone",
            "sampling, beside an earlier commit": "beside",
        }

    def test_machines_have_results_of_their_own(self) -> None:
        wide = run("wide", result(entry("cpu", 1.0)))
        narrow = run("narrow", result(entry("cpu", 2.0)), sets=NARROW_SETS)
        gpu = run("gpu", result(entry("cuda", 0.5)), gpus=["NVIDIA H200"])
        found = Recorded([wide, narrow, gpu])
        names = {place: found.find(place, "sampling", "digits-top", 8) for place in found.machines}
        assert {place: one.run.name for place, one in names.items() if one} == {
            WIDE: "wide",
            NARROW: "narrow",
            GPU: "gpu",
        }

    def chosen(self, *runs: Run) -> str:
        found = Recorded(runs).find(WIDE, "sampling", "digits-top", 8)
        assert found is not None
        return found.run.name


def test_own_slower_forms_are_no_rivals() -> None:
    one = result(entry("fastvq", 2.0), entry("torch", 2.5), entry("eager", 4.0), entry("cdist", 3.0, check=BAD))
    one.operation = "nearest code"
    rival = best_rival(one)
    assert rival is not None
    assert rival.peer == "eager"
    sampling = result(entry("cpu", 2.0), entry("torch", 2.5), entry("naive", 4.0))
    rival, mine = best_rival(sampling), ours(sampling)
    assert rival is not None
    assert mine is not None
    assert (mine.peer, rival.peer) == ("cpu", "torch")


def _link(run: Run, text: str) -> str:
    return f"<{run.name}:{text}>"


class TestTables:
    def test_claims(self) -> None:
        sampled = result(
            entry("naive", 6.0, extrapolated="from rows"), entry("cpu", 1.0, 3.0, 2.0), case="small-strict-top"
        )
        searched = result(
            entry("fastvq", 2e-3),
            entry("torch", 1e-3),
            entry("eager", 5e-3),
            operation="nearest code",
            case="K 512, D 64, forward + EMA",
            batch=65536,
        )
        alone = result(entry("cuda", 0.5), case="default-strict-bottom", batch=1)
        found = Recorded([run("a", sampled, searched), run("g", alone, gpus=["NVIDIA H200"], dirty=True)])
        lines = tables.claims(found, _link).splitlines()
        assert lines[0] == "| times as fast | what | time | compared with | on | run |"
        what = "8 grids of 16 x 16, prior with attention, 64 channels"
        assert lines[2] == f"| 3 e | {what} | 2 s | naive sampler, 6 s e | CPU, AVX-512 | <a:abcdef01> |"
        what = "nearest code + EMA, N 65536, K 512, D 64"
        assert lines[3] == f"| 2.5 | {what} | 2 ms | eager, 5 ms | CPU, AVX-512 | <a:abcdef01> |"
        rest = "not measured in this run | H200 | <g:abcdef01> |"
        assert lines[4] == f"| - | 1 grid of 64 x 64, 256 channels | 500 ms | {rest}"
        assert lines[5:] == [
            "",
            f"- CPU, AVX-512: {WIDE}; PyTorch 2.13.0+cpu, Python 3.11.7; commit abcdef01, 2026-01-02",
            f"- H200: {GPU}; PyTorch 2.13.0+cpu, Python 3.11.7; commit abcdef01 with changes, 2026-01-02",
        ]

    def test_no_ratio_in_a_claim_whose_check_failed(self) -> None:
        wrong = result(entry("naive", 6.0), entry("cpu", 2.0, check=BAD), case="small-strict-top")
        assert "| - | 8 grids" in tables.claims(Recorded([run("a", wrong)]), _link)
        assert "| 2 s (wrong) |" in tables.claims(Recorded([run("a", wrong)]), _link)

    def test_every_case_of_a_machine(self) -> None:
        first = result(
            entry("naive", 8.0),
            entry("torch", 3.0),
            entry("cpu", 2.0),
            entry("cpu bf16", 1.0, exact=False),
            floor_seconds=0.5,
            memory=[Memory("cpu", 12_000_000, 10_000_000)],
        )
        second = result(entry("cpu", 1.0), batch=2, floor_seconds=0.5)
        other = result(
            entry("fastvq", 1.0),
            entry("mm only", 0.5, check=None, whole=False),
            entry("conv2d", 2.0, extrapolated="from a part"),
            operation="row product",
        )
        elsewhere = run("n", result(entry("cpu", 9.0), batch=32), sets=NARROW_SETS)
        lines = tables.results(Recorded([run("a", first, second, other), elsewhere]), WIDE, _link).splitlines()
        assert lines[:5] == [
            "<details>",
            '<summary>Sampling: 2 cases; 1.5 times as fast as "torch"; 2 to 4 of the floor</summary>',
            "",
            "| case | batch | time | over naive | over torch | time / floor | cpu bf16, not exact | memory | run |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        assert lines[6] == "| digits-top | 8 | 2 s | 4 | 1.5 | 4 | 1 s | 12 MB (10 MB predicted) | <a:abcdef01> |"
        assert lines[5] == "| digits-top | 2 | 1 s | - | - | 2 | - | - | <a:abcdef01> |"
        assert lines[7:9] == ["", "</details>"]
        said = 'Row product: 1 case; 2 times as fast as "conv2d", in part extrapolated'
        assert lines[11] == f"<summary>{said}</summary>"
        assert lines[13] == "| case | batch | time | over conv2d | time / mm only | run |"
        assert lines[15] == "| digits-top | 8 | 1 s | 2 e | 2 | <a:abcdef01> |"

    def test_time_of_the_device(self) -> None:
        one = result(entry("cuda", 2.0, facts={"device_seconds": [1.0, 3.0, 1.5]}))
        assert "| digits-top | 8 | 2 s | 1.5 s |" in tables.results(
            Recorded([run("g", one, gpus=["NVIDIA H200"])]), GPU, _link
        )

    def test_cases_with_little_gained(self) -> None:
        kind = {"operation": "gated block"}
        cases = [
            result(entry("fastvq", 1.0), entry("compiled masked", 1.05), case="near", **kind),
            result(entry("fastvq", 2.0), entry("compiled masked", 1.0), case="slower", **kind),
            result(entry("fastvq", 1.0), entry("compiled masked", 1.2), case="gained", **kind),
            result(entry("fastvq", 1.0, check=BAD), entry("compiled masked", 0.1), case="wrong", **kind),
            result(entry("cpu", 1.0), entry("before", 1.0), case="beside"),
        ]
        assert tables.little_gained(Recorded([run("a", *cases)]), _link).splitlines()[5:7] == [
            "| 0.5 | gated block: slower, 8 | compiled masked | CPU, AVX-512, <a:abcdef01> |",
            "| 1.05 | gated block: near, 8 | compiled masked | CPU, AVX-512, <a:abcdef01> |",
        ]

    def test_runs_that_count_and_no_others(self) -> None:
        old = run("old", result(entry("cpu", 2.0)), date="2026-01-01T00:00:00+00:00")
        new = run("new", result(entry("cpu", 1.0)))
        assert tables.sources(Recorded([old, new]), _link).splitlines()[2:] == [
            "| CPU, AVX-512 | 2026-01-02 | abcdef01 | 2.13.0+cpu | faiss-cpu 1.15.1 | 0.2 | <new:new> |"
        ]


class TestPictures:
    def test_speed(self) -> None:
        cases = [
            result(entry("naive", 8.0 * n), entry("torch", 2.0 * n), entry("cpu", n / 2), batch=n, case=case)
            for case in ("small-strict-top", "small-strict-bottom")
            for n in (1, 8)
        ]
        cases.append(result(entry("cpu", 0.25), case="small-strict-top", batch=2))
        guess = entry("naive", 80.0, extrapolated="from rows")
        cases.append(result(guess, entry("cpu", 2.0), case="default-strict-bottom", batch=1))
        picture = figures.speed(Recorded([run("a", *cases)]), WIDE)
        assert picture is not None
        assert [panel.ticks for panel in picture.panels] == [(1, 2, 8), (1, 8), (1,)]
        naive, torch, cpu = picture.panels[0].series
        assert [one.label for one in (naive, torch, cpu)] == ["naive sampler", "torch engine", "fastvq"]
        assert naive.points == (Point(1, 8.0), Point(8, 8.0))
        assert cpu.points == (Point(1, 0.5, note="16x"), Point(2, 0.125), Point(8, 0.5, note="16x"))
        naive, cpu = picture.panels[2].series
        assert naive.points == (Point(1, 80.0, guessed=True),)
        assert cpu.points == (Point(1, 2.0, note="40x"),)
        assert picture.caption.endswith(
            "AMD EPYC with AVX-512, 48K of L1, 2 cores; PyTorch 2.13.0+cpu, Python 3.11.7; commit abcdef01, 2026-01-02."
        )

    def test_a_panel_shows_one_run(self) -> None:
        both = [result(entry("cpu", 2.0), case="small-strict-top", batch=n) for n in (1, 8)]
        old = run("old", *both, date="2026-01-01")
        new = run("new", result(entry("cpu", 1.0), case="small-strict-top", batch=2), date="2026-01-02")
        picture = figures.speed(Recorded([old, new]), WIDE)
        assert picture is not None
        assert [point.x for point in picture.panels[0].series[0].points] == [1, 8]

    def test_what_is_wrong_is_not_drawn(self) -> None:
        one = result(entry("naive", 8.0), entry("cpu", 1.0, check=BAD), case="small-strict-top")
        picture = figures.speed(Recorded([run("a", one)]), WIDE)
        assert picture is not None
        assert [series.label for series in picture.panels[0].series] == ["naive sampler"]

    def test_grid(self) -> None:
        both = [result(entry("cpu", 8.0 * s), case=f"digits-{n}") for n, s in (("top", 1), ("bottom", 3))]
        picture = figures.grid(Recorded([run("a", *both)]), WIDE)
        assert picture is not None
        assert picture.panels[0].series[0].points == (Point(2, 1.0), Point(4, 3.0))

    def test_nearest_code_in_multiples_of_the_floor(self) -> None:
        one = result(
            entry("fastvq", 3.0),
            entry("eager", 6.0),
            entry("cdist", 1.0, check=BAD),
            operation="nearest code",
            case="K 512, D 64, forward + EMA",
            batch=65536,
            floor_seconds=2.0,
        )
        picture = figures.nearest_code(Recorded([run("a", one)]), WIDE)
        assert picture is not None
        n, k = picture.panels
        assert {series.label: series.points for series in n.series} == {
            "fastvq": (Point(65536, 1.5),),
            "eager": (Point(65536, 3.0),),
        }
        assert k.series[0].points == (Point(512, 1.5),)

    def test_memory(self) -> None:
        sampled = result(entry("cpu", 1.0), case="small-strict-top", memory=[Memory("cpu", 12, 10)])
        searched = result(
            entry("fastvq", 1.0),
            operation="nearest code",
            case="K 8192, D 64, forward + EMA",
            batch=65536,
            memory=[Memory("fastvq", 6), Memory("eager", 2000)],
        )
        picture = figures.memory(Recorded([run("a", sampled, searched)]), WIDE)
        assert picture is not None
        first, second = picture.panels
        assert first.rows == ("64 channels, top, batch 8",)
        assert {series.label: series.points for series in first.series} == {
            "predicted": (Point(10, 0),),
            "measured": (Point(12, 0),),
        }
        assert second.rows == (
            "N 65536, fastvq",
            "N 65536, eager",
        )
        assert [series.label for series in second.series] == ["measured"]

    def test_floor_of_every_operation(self) -> None:
        cases = [
            result(entry("cpu", 3.0), floor_seconds=2.0),
            result(entry("cpu", 4.0), case="small-strict-top", floor_seconds=2.0),
            result(entry("cpu", 4.0), entry("before", 1.0), case="default-strict-top", floor_seconds=2.0),
            result(entry("fastvq", 4.0, check=BAD), operation="gated block", floor_seconds=2.0),
        ]
        picture = figures.floor(Recorded([run("a", *cases)]))
        assert picture is not None
        (panel,) = picture.panels
        assert panel.rows == ("sampling, digits", "sampling, 64 channels")
        assert panel.series[0].points == (Point(1.5, 0), Point(2.0, 1))

    def test_of_nothing_there_are_none(self) -> None:
        assert pages.pictures(Recorded([])) == []

    def test_drawn_once_and_again_where_the_data_change(self, tmp_path: Path) -> None:
        series = Series("naive", (Point(1, 1.0, note="2x"), Point(2, 2.0, guessed=True)), 0)
        rows = Panel("rows", "time / floor", "", (Series("a", (Point(2, 0),), 1),), "times", rows=("here",))
        panels = Panel("title", "batch", "time", (series,), ticks=(1, 2)), rows
        picture = Picture("a", "alt", "caption", ("a.json",), panels, share_y=False)
        path = tmp_path / "a.png"
        assert not is_current(picture, path)
        data = draw(picture)
        assert data == draw(picture)
        path.write_bytes(data)
        assert is_current(picture, path)
        assert not is_current(dataclasses.replace(picture, caption="another"), path)
        path.write_bytes((ROOT / "docs" / "samples.png").read_bytes())
        assert not is_current(picture, path)


BLOCKS: dict[str, Callable[[], str]] = {"one": lambda: "new 1", "two": lambda: "new 2"}


class TestMarkers:
    def test_what_stands_between_is_replaced(self) -> None:
        text = (
            "a `<!-- begin x -->`\n<!-- begin one -->\nold\n<!-- end one -->\nb\n<!-- begin two -->\n<!-- end two -->\n"
        )
        new, changed = replaced(text, BLOCKS, "page.md")
        assert new == (
            "a `<!-- begin x -->`\n<!-- begin one -->\nnew 1\n<!-- end one -->\nb\n"
            "<!-- begin two -->\nnew 2\n<!-- end two -->\n"
        )
        assert changed == ["one", "two"]
        assert replaced(new, BLOCKS, "page.md") == (new, [])

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("begin thre", "page.md: no block is called thre; expected one of one, two"),
            ("begin one,end one,begin one,end one", "page.md: one is there twice"),
            ("begin one,begin two", "page.md: two begins before the end of one"),
            ("begin one,end two", "page.md: two ends without having begun"),
            ("end one", "page.md: one ends without having begun"),
            ("begin one", "page.md: one has no end"),
        ],
        ids=["unknown", "doubled", "nested", "another-end", "no-begin", "no-end"],
    )
    def test_wrong_markers_are_named(self, text: str, said: str) -> None:
        page = "\n".join(f"<!-- {marker} -->" for marker in text.split(","))
        with pytest.raises(MarkerError) as error:
            replaced(page, BLOCKS, "page.md")
        assert str(error.value) == said

    def test_links_lead_from_the_page_to_the_file(self) -> None:
        one = run("gpu/a.json")
        assert link_from(Path("README.md"))(one, "x") == "[x](bench/results/gpu/a.json)"
        assert link_from(Path("docs/benchmarks.md"))(one, "x") == "[x](../bench/results/gpu/a.json)"


class TestCommand:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "docs").mkdir()
        (tmp_path / "README.md").write_text("<!-- begin measured -->\n<!-- end measured -->\n")
        (tmp_path / "docs" / "a.md").write_text("<!-- begin figure-speed -->\n<!-- end figure-speed -->\n")
        cases = [
            result(entry("naive", 4.0), entry("cpu", 1.0), case="small-strict-top", batch=batch) for batch in (1, 8)
        ]
        monkeypatch.setattr(pages, "ROOT", tmp_path)
        monkeypatch.setattr(pages, "recorded", lambda: Recorded([run("a", *cases)]))
        return tmp_path

    def test_check_changes_nothing_and_refreshing_once_suffices(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (root / "README.md").read_text()
        assert pages.main(["--check"]) == 1
        stale = ["README.md: measured", "docs/a.md: figure-speed", "docs/figures/speed.png", "docs/figures/grid.png"]
        assert capsys.readouterr().out.splitlines() == [f"{name}: out of date" for name in stale]
        assert (root / "README.md").read_text() == before
        assert not (root / "docs" / "figures").exists()
        assert pages.main([]) == 0
        assert capsys.readouterr().out.splitlines() == [f"{name}: refreshed" for name in stale]
        assert "| 4 | 8 grids of 16 x 16" in (root / "README.md").read_text()
        text = (root / "docs" / "a.md").read_text()
        assert "](figures/speed.png)" in text
        assert text.splitlines()[-2].endswith("2026-01-02.* Recorded: [1](../bench/results/a).")
        assert pages.main(["--check"]) == 0
        assert capsys.readouterr().out == ""

    def test_a_picture_that_is_gone_is_named(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pages.main([])
        shutil.rmtree(root / "docs" / "figures")
        capsys.readouterr()
        assert pages.main(["--check"]) == 1
        assert capsys.readouterr().out.splitlines()[0] == "docs/figures/speed.png: out of date"

    def test_a_wrong_marker_ends_it_before_anything_is_written(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (root / "docs" / "b.md").write_text("<!-- begin speed -->\n")
        before = (root / "README.md").read_text()
        assert pages.main([]) == 2
        assert "docs/b.md: no block is called speed; expected one of measured," in capsys.readouterr().err
        assert (root / "README.md").read_text() == before
