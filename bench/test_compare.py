"""Two runs compared: what is claimed, what is not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.compare import DifferentError, Spread, lines, verdict
from bench.files import Session
from bench.harness import Entry
from bench.made_up import BAD, NARROW_SETS, entry, result, session

SLOW, FAST = [4.0, 4.1, 4.2], [1.0, 1.1, 1.2]
# As many rounds of which one was disturbed.
DISTURBED = [1.0, 1.1, 1.1, 1.2, 1.2, 1.2, 1.3, 9.0]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (entry("cpu", *SLOW), entry("cpu", *FAST), "faster"),
        (entry("cpu", *FAST), entry("cpu", *SLOW), "slower"),
        (entry("cpu", 1.0, 1.1, 1.3), entry("cpu", 1.2, 1.3, 1.4), ""),
        (entry("cpu", *([2.0] * 7), 1.0), entry("cpu", *DISTURBED), "faster"),
        # Of few rounds all count.
        (entry("cpu", *([2.0] * 7)), entry("cpu", *DISTURBED), ""),
        (entry("cpu", 4.0, 4.1), entry("cpu", *FAST), "2 rounds"),
        (entry("cpu", *SLOW), entry("cpu", 1.0), "1 round"),
        (entry("cpu", *SLOW), entry("cpu", *FAST, check=BAD), "FAILS NOW"),
        (entry("cpu", *SLOW, check=BAD), entry("cpu", *FAST), "failed before"),
        (entry("cpu", *SLOW, check=BAD), entry("cpu", *FAST, check=BAD), "fails in both"),
        (entry("cpu", *SLOW), entry("cpu", *FAST, check=None), "not checked after"),
        (entry("cpu", *SLOW, exact=False, check=None), entry("cpu", *FAST), "not exact"),
        (entry("mm", *SLOW, whole=False), entry("mm", *FAST, whole=False), "part of the operation"),
        (entry("naive", 4.0, extrapolated="from rows"), entry("naive", *FAST), "extrapolated"),
    ],
    ids=[
        "gain",
        "loss",
        "overlap",
        "many-rounds",
        "few-rounds-all-count",
        "two-rounds",
        "one-round",
        "fails-now",
        "failed-before",
        "fails-in-both",
        "not-checked",
        "not-exact",
        "part",
        "extrapolated",
    ],
)
def test_verdict(before: Entry, after: Entry, said: str) -> None:
    assert verdict(before, after) == said


def test_spread() -> None:
    assert Spread.of(entry("a", 5.0, 1.0, 2.0, 3.0, 4.0)) == (5, 1.0, 2.0, 4.0, 5.0)
    assert Spread.of(entry("a", 5.0)) == (1, 5.0, 5.0, 5.0, 5.0)
    kept = {"rounds": 9, "min": 1.0, "q1": 2.0, "q3": 4.0, "max": 5.0}
    assert Spread.of(entry("a", 3.0, facts={"statistics": kept})) == (9, 1.0, 2.0, 4.0, 5.0)


def test_table_names_both_runs_and_every_peer_of_both() -> None:
    before = session(result(entry("eager", *SLOW), entry("cpu", *SLOW), entry("gone", 1.0)), commit="1" * 40)
    after = session(
        result(entry("eager", *SLOW), entry("cpu", *FAST)),
        result(entry("cpu", 1.0), batch=32),
        commit="2" * 40,
        dirty=True,
    )
    said = lines(before, after, compare.compare(before, after))
    assert said[:3] == [
        "before: commit 11111111, 2026-01-02, AMD EPYC",
        "after: commit 22222222 with changes, 2026-01-02, AMD EPYC",
        "",
    ]
    assert said[5].split()[:4] == ["sampling:", "digits-top", "8", "eager"]
    cpu = said[6].split()
    assert cpu[0] == "cpu"
    assert cpu[1:7] == ["4.1", "s", "4.05", "s", "to", "4.15"]
    assert cpu[-2:] == ["3.73", "faster"]
    assert said[-2:] == [
        "2 compared: 1 faster, 0 slower, 0 failing now; nothing is claimed of the others.",
        "Peers of other libraries: 1 to 1 times as fast.",
    ]


def test_what_is_wrong_has_no_ratio() -> None:
    before, after = session(result(entry("cpu", *SLOW))), session(result(entry("cpu", *FAST, check=BAD)))
    row = lines(before, after, compare.compare(before, after))[5]
    assert row.split()[-3:] == ["-", "FAILS", "NOW"]


def test_other_versions_are_named() -> None:
    before, after = session(torch="2.11.0"), session(torch="2.13.0")
    said = lines(before, after, compare.compare(before, after))
    assert "NOTE: torch 2.11.0 before, 2.13.0 after: differences may be its own" in said
    assert said[-1] == "No case and peer are in both."


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"cpu": "Intel Xeon"}, "processor AMD EPYC before, Intel Xeon after"),
        ({"sets": NARROW_SETS, "caches": {"L1d": "48K"}}, "instruction sets avx2, avx512f before, avx2 after"),
        ({"caches": {"L1d": "32K"}}, "caches L1d 48K before, L1d 32K after"),
        ({"threads": 1}, "threads 2 before, 1 after"),
        ({"cores": 4, "threads": 4}, "cores 2 before, 4 after; threads 2 before, 4 after"),
        ({"gpus": ["NVIDIA H200"]}, "GPUs none before, NVIDIA H200 after"),
    ],
    ids=["processor", "vectors", "caches", "threads", "cores", "gpu"],
)
def test_other_machines_are_refused(other: dict[str, Any], said: str) -> None:
    one = result(entry("cpu", *SLOW))
    with pytest.raises(DifferentError) as error:
        compare.compare(session(one), session(one, **other))
    assert str(error.value) == f"expected runs of one machine, got {said}"


def test_full_and_reduced_size_are_not_compared() -> None:
    with pytest.raises(DifferentError, match="expected runs at the same size, got one at full and one at reduced size"):
        compare.compare(session(), session(quick=True))


@pytest.mark.parametrize(
    ("after", "status"),
    [
        (session(result(entry("cpu", *FAST))), 0),
        (session(result(entry("cpu", *SLOW))), 0),
        (session(result(entry("cpu", 8.0, 8.1, 8.2))), 1),
        (session(result(entry("cpu", *SLOW), entry("eager", 8.0, 8.1, 8.2))), 0),
        (session(result(entry("cpu", *SLOW, check=BAD))), 1),
        (session(result(entry("cpu", *FAST)), cpu="another"), 2),
    ],
    ids=["gain", "nothing", "loss", "loss-of-another-library", "wrong", "refused"],
)
def test_exit_status(
    after: Session, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions = {"a.json": session(result(entry("cpu", *SLOW), entry("eager", *SLOW))), "b.json": after}
    monkeypatch.setattr(compare, "load", lambda path: sessions[str(path)])
    assert compare.main(["a.json", "b.json"]) == status
    assert ("not compared: expected runs of one machine" in capsys.readouterr().err) == (status == 2)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([1]))
    assert compare.main([str(path), str(path)]) == 2
    assert f"not compared: {path}: expected results of benchmarks, got a list" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "b.json"), str(path)]) == 2
    assert f"not compared: {tmp_path / 'b.json'}: cannot be read" in capsys.readouterr().err
