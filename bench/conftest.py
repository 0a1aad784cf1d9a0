"""Options, the contest between the peers of a case on top of pytest-benchmark, and the report at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.peers  # noqa: F401
from bench.cases import Case
from bench.files import benchmark_json, free_path, write_json
from bench.groups import Group
from bench.harness import Entry, Recorder
from bench.machine import describe_machine
from bench.report import legend, tables

_RECORDER = pytest.StashKey[Recorder]()
_FILE = pytest.StashKey[Path | None]()
_GROUP = pytest.StashKey[Group | None]()
# With any of these the times of reduced sizes are wanted too.
_KEEPING = ("benchmark_only", "benchmark_json", "benchmark_save", "benchmark_autosave", "benchmark_compare")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvq", "benchmarks of fastvq")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run every benchmark at full size and print the table; otherwise small versions that only check results",
    )
    group.addoption("--results", metavar="DIR", type=Path, help="write all measurements to a JSON file in this folder")


def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("--benchmark")
    if not full and not any(config.getoption(name) for name in _KEEPING):
        config.option.benchmark_disable = True

    def log(line: str) -> None:
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and full:
            terminal.ensure_newline()
            terminal.write_line(line)
            terminal.flush()

    config.stash[_RECORDER] = Recorder(quick=not full, log=log)
    folder = config.getoption("--results")
    config.stash[_FILE] = None if folder is None else free_path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_CLOCK))


class _Clock:
    """A timer for pytest-benchmark that goes on by what has been measured before."""

    __name__ = "measured_in_turns"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def reset(self) -> None:
        self.now = 0.0


_CLOCK = _Clock()


@pytest.fixture
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Where results go; it also says whether this is the quick run."""
    return request.config.stash[_RECORDER]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread in the smoke run: on tensors this small more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.config.getoption("--benchmark") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def contest(
    request: pytest.FixtureRequest, benchmark: Any, recorder: Recorder, threads: None
) -> Callable[[Case, str], None]:
    """Times a peer in a case together with all others that are selected, checks what it found, and reports its rounds.

    See :class:`bench.groups.Group` for why they are timed together. What is not comparable has a group of its own in
    the tables of pytest-benchmark, which show ratios within groups.
    """
    config, full = request.config, request.config.getoption("--benchmark")

    def run(case: Case, name: str) -> None:
        recorder.quick = not full or benchmark.disabled
        group = config.stash.get(_GROUP, None)
        if group is None or group.case is not case:
            config.stash[_GROUP] = group = None  # what it holds is not wanted beside the next
            recorder.log(case.id)
            group = config.stash[_GROUP] = Group(case, recorder, small=not full)
        # Where nothing is timed nobody has to take turns, and other processes may run the other peers.
        group.run([name] if recorder.quick else _selected(request, case))
        if name in group.result.left_out:
            pytest.skip(group.result.left_out[name])
        entry = group.result.entry(name)
        assert entry is not None
        if entry.exact and entry.whole:
            assert entry.check is not None
            assert entry.check.passed, f"{name}: {entry.check.summary}"
        benchmark.group = case.id + _apart(entry)
        stored = dataclasses.asdict(entry)
        del stored["seconds"]
        benchmark.extra_info |= {"operation": case.operation, "case": case.name, "batch": group.result.batch, **stored}
        rounds = iter(entry.seconds)

        def go_on() -> None:
            _CLOCK.now += next(rounds, 0.0)

        benchmark.pedantic(go_on, setup=_CLOCK.reset, rounds=len(entry.seconds))

    return run


def _selected(request: pytest.FixtureRequest, case: Case) -> list[str]:
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    return [call.params["name"] for call in calls if call is not None and call.params.get("case") is case]


def _apart(entry: Entry) -> str:
    if entry.extrapolated:
        return ", extrapolated"
    if not entry.whole:
        return ", part of it"
    return "" if entry.exact else ", not exact"


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A run that does not come to its end loses one case, not all."""
    recorder, path = item.config.stash[_RECORDER], item.config.stash[_FILE]
    if path is not None and recorder.results:
        write_json(recorder, path)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastvq"] = describe_machine()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    source = config.stash[_RECORDER].source
    commit_info |= {"id": source["commit"], "dirty": source["dirty"]}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    benchmark_json(config.stash[_RECORDER], output_json)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash[_RECORDER]
    if not recorder.results:
        return
    if recorder.quick:
        count = len(recorder.results)
        size = "full" if config.getoption("--benchmark") else "reduced"
        terminalreporter.write_line(f"{count} cases at {size} size: results checked, no times reported (--benchmark)")
    else:
        terminalreporter.section("benchmarks")
        machine, source = describe_machine(), recorder.source
        threads = f"{machine['threads']} threads, {', '.join(f'{k} {v}' for k, v in machine['caches'].items())}"
        terminalreporter.write_line(f"{machine['cpu']}, {threads}; load before: {recorder.load:.1f}")
        for gpu in machine["gpus"]:
            terminalreporter.write_line(f"GPU: {gpu}")
        terminalreporter.write_line(f"commit {source['commit']}{' with changes' if source['dirty'] else ''}")
        for line in ["", *tables(recorder.results, recorder.ceilings), *legend(recorder.results, recorder.ceilings)]:
            terminalreporter.write_line(line)
    path = config.stash[_FILE]
    if path is not None:
        terminalreporter.write_line(f"written to {path}")
