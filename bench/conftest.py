"""Options, the session's recorder, and the report at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness import Recorder
from bench.machine import describe_machine
from bench.report import free_path, legend, tables, write_json

_RECORDER = pytest.StashKey[Recorder]()
_FILE = pytest.StashKey[Path | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvq", "benchmarks of fastvq")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run every benchmark at full size and print the table; otherwise small versions that only check results",
    )
    group.addoption("--results", metavar="DIR", type=Path, help="write all measurements to a JSON file in this folder")


def pytest_configure(config: pytest.Config) -> None:
    def log(line: str) -> None:
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and config.getoption("--benchmark"):
            terminal.ensure_newline()
            terminal.write_line(line)
            terminal.flush()

    config.stash[_RECORDER] = Recorder(quick=not config.getoption("--benchmark"), log=log)
    folder = config.getoption("--results")
    config.stash[_FILE] = None if folder is None else free_path(folder)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A run that does not come to its end loses one case, not all."""
    recorder, path = item.config.stash[_RECORDER], item.config.stash[_FILE]
    if path is not None and recorder.results:
        write_json(recorder, path)


@pytest.fixture
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Where results go; it also says whether this is the quick run."""
    return request.config.stash[_RECORDER]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash[_RECORDER]
    if not recorder.results:
        return
    if recorder.quick:
        count = len(recorder.results)
        terminalreporter.write_line(f"{count} cases at reduced size: results checked, no times reported (--benchmark)")
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
