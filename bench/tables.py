"""Recorded results as Markdown: what is claimed, every case by operation and machine, and the runs behind it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

from bench.harness import Entry, Result
from bench.recorded import BESIDE, CLAIMS, MACHINES, Claim, Found, Recorded, Run, best_rival, ours
from bench.report import MISSING, over_floor, over_part, ratio
from bench.units import number, seconds, size

# Markdown that leads to the file of a run, with a text.
Link = Callable[[Run, str], str]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def claims(recorded: Recorded, link: Link) -> str:
    """What is measured on which machine, ratios first; a claim without a recorded result has no row."""
    found = [(claim, one) for claim in CLAIMS if (one := _find(recorded, claim)) is not None]
    header = ["times as fast", "what", "time", "compared with", "on", "run"]
    machines = dict.fromkeys(one.run.machine for _, one in found)
    lines = markdown(header, [_claim(claim, one, link) for claim, one in found])
    return "\n".join([*lines, "", *(f"- {line}" for line in _machines([one for _, one in found], list(machines)))])


def _find(recorded: Recorded, claim: Claim) -> Found | None:
    places = (recorded.find(machine, claim.operation, claim.case, claim.batch) for machine in claim.machines)
    return next((one for one in places if one is not None and ours(one.result) is not None), None)


def _claim(claim: Claim, found: Found, link: Link) -> list[str]:
    result = found.result
    mine = ours(result)
    assert mine is not None
    other = best_rival(result) if claim.over is None else result.entry(claim.over)
    times, against = MISSING, "not measured in this run"
    if other is not None:
        times = ratio(result, mine, other.peer)
        against = f"{claim.against or other.peer}, {_time(other)}"
    on = MACHINES.get(found.run.machine, found.run.machine)
    return [times, claim.what, _time(mine), against, on, link(found.run, found.run.commit[:8])]


def _machines(found: Sequence[Found], machines: Sequence[str]) -> list[str]:
    """What the short names of machines mean, with versions, commits and dates."""
    lines = []
    for machine in machines:
        runs = {one.run.name: one.run for one in found if one.run.machine == machine}.values()
        versions = "; ".join(dict.fromkeys(run.versions for run in runs))
        commits = " and ".join(dict.fromkeys(f"{run.commit}, {run.session.date[:10]}" for run in runs))
        lines.append(f"{MACHINES.get(machine, machine)}: {machine}; {versions}; commit {commits}")
    return lines


def results(recorded: Recorded, machine: str, link: Link) -> str:
    """Every case measured on a machine: an operation at a time, folded, with what it comes to in its title."""
    every = recorded.of(machine)
    blocks = []
    for operation in dict.fromkeys(key[0] for key in every):
        found = [one for key, one in every.items() if key[0] == operation]
        rows = operation_rows(found, link)
        title = f"{operation.capitalize()}: {_in_short([one.result for one in found])}"
        blocks.append(_folded(title, markdown(rows[0], rows[1:])))
    return "\n\n".join(blocks)


def _in_short(group: Sequence[Result]) -> str:
    """Number of cases, and between what ratios and multiples of floors lie."""
    said = [f"{len(group)} case{'' if len(group) == 1 else 's'}"]
    found = [(mine, result, best_rival(result)) for result in group if (mine := ours(result)) and mine.comparable]
    ratios = [rival.median / mine.median for mine, _, rival in found if rival is not None]
    floors = [mine.median / result.floor_seconds for mine, result, _ in found if result.floor_seconds]
    if ratios:
        rivals = {rival.peer for _, _, rival in found if rival is not None}
        whom = f'"{rivals.pop()}"' if len(rivals) == 1 else "the best of the others"
        guessed = any(rival.extrapolated for _, _, rival in found if rival is not None)
        said.append(f"{_range(ratios)} times as fast as {whom}{', in part extrapolated' if guessed else ''}")
    if floors:
        said.append(f"{_range(floors)} of the floor")
    return "; ".join(said)


def _range(values: Sequence[float]) -> str:
    least, most = number(min(values)), number(max(values))
    return least if least == most else f"{least} to {most}"


def operation_rows(found: Sequence[Found], link: Link) -> list[list[str]]:
    """Header and rows of an operation: our time, how many times as fast as each of the others, and of the floor.

    What no row has is left out.
    """
    entries = [(one.result, entry) for one in found for entry in one.result.entries]
    mine = {entry.peer for result, entry in entries if entry is ours(result)}
    others = dict.fromkeys(e.peer for _, e in entries if e.exact and e.whole and e.peer not in mine)
    inexact = dict.fromkeys(e.peer for _, e in entries if e.whole and not e.exact)
    parts = dict.fromkeys(e.peer for _, e in entries if not e.whole)
    columns = [
        ["case", *(one.result.case for one in found)],
        ["batch", *(str(one.result.batch) for one in found)],
        ["time", *_cells(found, lambda _, entry: _time(entry))],
        ["of it on the device", *_cells(found, _device)],
        *([f"over {peer}", *_cells(found, functools.partial(ratio, peer=peer))] for peer in others),
        *([f"time / {part}", *_cells(found, functools.partial(over_part, part=part))] for part in parts),
        ["time / floor", *_cells(found, lambda result, entry: over_floor(entry, result.floor_seconds))],
        *([f"{peer}, not exact", *(_time_of(one.result.entry(peer)) for one in found)] for peer in inexact),
        ["memory", *_cells(found, _memory)],
        ["run", *(link(one.run, one.run.commit) for one in found)],
    ]
    told = [column for column in columns if set(column[1:]) != {MISSING}]
    return [list(row) for row in zip(*told, strict=True)]


def _cells(found: Sequence[Found], cell: Callable[[Result, Entry], str]) -> list[str]:
    """Of our entry in each row."""
    return [MISSING if (mine := ours(one.result)) is None else cell(one.result, mine) for one in found]


def _time_of(entry: Entry | None) -> str:
    return MISSING if entry is None else _time(entry)


def _time(entry: Entry) -> str:
    wrong = " (wrong)" if entry.check is not None and not entry.check.passed else ""
    return seconds(entry.median) + (" e" if entry.extrapolated else "") + wrong


def _device(_: Result, entry: Entry) -> str:
    found = entry.facts.get("device_seconds")
    return seconds(statistics.median(found)) if found else MISSING


def _memory(result: Result, entry: Entry) -> str:
    found = next((one for one in result.memory if one.peer == entry.peer), None)
    if found is None:
        return MISSING
    return size(found.measured) + ("" if found.predicted is None else f" ({size(found.predicted)} predicted)")


def sources(recorded: Recorded, link: Link) -> str:
    """The runs that count for any case: date, commit, versions, how busy the machine was before, file."""
    rows = []
    for machine in MACHINES:
        used = {one.run.name: one.run for one in recorded.of(machine).values()}
        rows += [_source(run, link) for run in sorted(used.values(), key=lambda run: run.session.date)]
    return "\n".join(markdown(["machine", "date", "commit", "PyTorch", "other libraries", "load", "file"], rows))


def _source(run: Run, link: Link) -> list[str]:
    session = run.session
    peers = ", ".join(f"{name} {version}" for name, version in session.versions.get("peers", {}).items() if version)
    load = MISSING if session.load is None else f"{session.load:.1f}"
    versions = session.versions["torch"]
    return [MACHINES[run.machine], session.date[:10], run.commit, versions, peers or MISSING, load, link(run, run.name)]


# Below this much gained over the best of the others a case is named.
_LITTLE = 1.1


def little_gained(recorded: Recorded, link: Link) -> str:
    """Cases in which the best of the others is as fast or nearly so, folded, the worst first."""
    compared = [
        (result.speedup(mine, rival.peer), result, rival, run)
        for machine in MACHINES
        for (operation, _, _), (result, run) in recorded.of(machine).items()
        if BESIDE not in operation and (mine := ours(result)) and mine.comparable and (rival := best_rival(result))
    ]
    few = sorted(((times, *rest) for times, *rest in compared if times and times < _LITTLE), key=lambda one: one[0])
    rows = [
        [
            number(times),
            f"{one.operation}: {one.case}, {one.batch}",
            rival.peer,
            f"{MACHINES[run.machine]}, {link(run, run.commit)}",
        ]
        for times, one, rival, run in few
    ]
    title = f"{len(rows)} of {len(compared)} cases: less than {_LITTLE:g} times as fast as the best of the others"
    return _folded(title, markdown(["times as fast", "case", "as", "on"], rows))


def _folded(title: str, lines: Sequence[str]) -> str:
    return "\n".join(["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>"])
