"""Measuring tiles, with kernels and a timer that stand in for those of a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.cases import case_of
from bench.gpu import tune
from bench.gpu.files import load
from fastvq.kernels import tuning
from fastvq.kernels.tuning import tuned


class Toy(NamedTuple):
    block: int


TOYS = (Toy(1), Toy(2), Toy(3))


def ask(kernel: str, sizes: str, rule: int = 4) -> int:
    return (tuned(kernel, 90, sizes, TOYS) or Toy(rule)).block


def toy(kernel: str, *sizes: str, rule: int = 4) -> Callable[[], Callable[[], object]]:
    """Asks for tiles when it is made and when it runs; a run returns them all."""

    def make() -> Callable[[], object]:
        first = ask(kernel, sizes[0], rule)
        return lambda: [first, *(ask(kernel, size, rule) for size in sizes[1:])]

    return make


def timer(run: Callable[[], Any]) -> float:
    """The larger the blocks the slower, but one of 3 fails."""
    blocks = run()
    if 3 in blocks:
        raise RuntimeError("out of shared memory")
    return 1e-3 * sum(blocks)


@pytest.fixture
def table(tmp_path: Path) -> tune.Table:
    return tune.Table(tmp_path / "out.json")


def run(table: tune.Table, some: dict[str, Any], seconds: float = 60.0, timer: tune.Timer = timer) -> list[str]:
    said: list[str] = []
    tune.tune(table, some, timer, time.monotonic() + seconds, said.append)
    return said


def test_the_quickest_of_every_kernel_and_size(table: tune.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run(table, {"work": toy("a", "small", "large"), "more": toy("a", "small"), "other": toy("b", "any", rule=1)})
    assert table.tiles == {"90": {"a": {"small": {"block": 1}, "large": {"block": 1}}}}
    found = table.measured["90"]["a"]["small"]
    assert found["workload"] == "work"
    assert found["rule_seconds"] == pytest.approx(8e-3)
    # One that fails is noted and no more; the other size of the kernel stays as it was.
    assert [one["found"] for one in found["candidates"]] == [
        pytest.approx(5e-3),
        pytest.approx(6e-3),
        "RuntimeError: out of shared memory",
    ]
    # What is no quicker than the rule leaves it.
    assert table.measured["90"]["b"]["any"]["rule_seconds"] == pytest.approx(1e-3)
    assert len(said) == 3
    assert said[-1] == "other: b, any: rule 1 ms; as before; 2 candidates timed"
    monkeypatch.setattr(tuning, "TABLE", table.path)
    assert ask("a", "small") == 1
    assert ask("b", "any", 1) == 1


def test_the_file_is_written_after_each(table: tune.Table) -> None:
    counts: list[int] = []

    def counting(one: Callable[[], Any]) -> float:
        stored = load(table.path)
        counts.append(0 if stored is None else len(stored["measured"]["90"]))
        return timer(one)

    run(table, {"one": toy("a", "any"), "two": toy("b", "any")}, timer=counting)
    assert counts == [0] * 4 + [1] * 4
    stored = load(table.path)
    assert stored is not None
    assert {"machine", "versions", "commit"} <= set(stored)


def test_tables_of_other_gpus_are_kept(tmp_path: Path) -> None:
    known = tmp_path / "known.json"
    others = {"80": {"a": {"any": {"block": 2}}}, "90": {"a": {"any": {"block": 2}}}}
    known.write_text(json.dumps({"format": 1, "tiles": others, "measured": {}}))
    table = tune.Table.of(tmp_path / "out.json", known)
    run(table, {"work": toy("a", "any")})
    assert table.tiles == {"80": {"a": {"any": {"block": 2}}}, "90": {"a": {"any": {"block": 1}}}}


def test_caps(table: tune.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(one: Callable[[], Any]) -> float:
        if one() == [2]:
            time.sleep(30)
        return timer(one)

    monkeypatch.setattr(tune, "KERNEL_SECONDS", 1.0)
    start = time.monotonic()
    said = run(table, {"work": toy("a", "any"), "more": toy("b", "any")}, seconds=20, timer=slow)
    assert time.monotonic() - start < 15
    candidates = table.measured["90"]["a"]["any"]["candidates"]
    assert [one["found"] for one in candidates] == [pytest.approx(1e-3), "out of time", "out of time"]
    assert table.tiles["90"]["a"]["any"] == {"block": 1}
    assert len(said) == 2
    assert run(table, {"late": toy("c", "any")}, seconds=-1) == ["late: out of time"]


def test_a_workload_that_cannot_run_is_named(table: tune.Table) -> None:
    def make() -> Callable[[], object]:
        raise RuntimeError("no such thing")

    assert run(table, {"bad": make, "work": toy("a", "any")})[0] == "bad: RuntimeError: no such thing"
    assert table.tiles


def test_processes_run_every_candidate_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[int]] = []

    def make() -> Callable[[], object]:
        first = ask("a", "any")
        return lambda: ran.append([first])

    def broken() -> Callable[[], object]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(tune, "synchronise", lambda device: None)
    for index in range(2):
        tune.warm(index, 2, {"bad": broken, "work": make})
    # To find out what it asks for, three times, and with the rule and each candidate.
    assert sorted(ran) == [[1], [2], [3], *[[4]] * 4]
    said = sorted(capsys.readouterr().out.splitlines())
    assert said[:3] == ["bad: RuntimeError: no such thing"] * 3
    assert [line.strip() for line in said[3:]] == ["work: a, any: 1 candidates"] * 3


def test_workloads_exist() -> None:
    some = tune.workloads()
    assert {"front float32", "front bfloat16"} < set(some)
    for name in tune.OPERATIONS:
        assert case_of(name).device == "cuda"
