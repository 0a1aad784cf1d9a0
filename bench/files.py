"""Results as JSON: files of a session, of pytest-benchmark, and of engines on a GPU; all are read as the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Check, Entry, Memory, Recorder, Result
from bench.machine import Ceilings, describe_commit, describe_machine, describe_versions, now

FORMAT = 2
# Where pytest-benchmark's files hold what it has no place for: the session, and its results without their entries.
KEY = "fastvq"
# What of its statistics stands for rounds that were not kept, in the entry's fact of that name.
STATISTICS = ("rounds", "min", "q1", "q3", "max")


@dataclass
class Session:
    """What a file holds; see :class:`bench.harness.Recorder`.

    Attributes:
        load: of the machine before the first case, where it was noted.
        quick: inputs were shrunk.
    """

    date: str
    machine: dict[str, Any]
    versions: dict[str, Any]
    commit: str | None
    dirty: bool | None
    ceilings: Ceilings
    results: list[Result]
    load: float | None = None
    quick: bool = False


def load(path: Path) -> Session:
    """Read a file of ``--results``, of ``--benchmark-json``, ``--benchmark-save`` and ``--benchmark-autosave``, or of
    :mod:`bench.gpu.sampler`.

    Raises:
        ValueError: it is none of them.
    """
    try:
        stored = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: expected results of benchmarks, got a {type(stored).__name__}")
    if "benchmarks" in stored and KEY in stored:
        stored = _united(stored)
    if "lines" in stored and "gpu_flops_per_s" in stored:
        stored = _lines_as_results(stored)
    if not {"results", "ceilings"} <= stored.keys():
        raise ValueError(f"{path}: expected results of benchmarks, got a file with {', '.join(stored) or 'nothing'}")
    return session_of(stored)


def session_of(stored: Mapping[str, Any]) -> Session:
    ceilings = Ceilings()
    rates = stored["ceilings"]
    ceilings.gemm, ceilings.gpu = rates["flops_per_s"], rates.get("gpu_flops_per_s", {})
    ceilings.read = {int(size): found for size, found in rates["read_bytes_per_s"].items()}
    names = ("date", "machine", "versions", "commit", "dirty")
    results = [_result(one) for one in stored["results"]]
    facts = (stored[name] for name in names)
    return Session(*facts, ceilings, results, stored.get("load_before"), stored.get("quick", False))


def _result(stored: Mapping[str, Any]) -> Result:
    return Result(
        stored["operation"],
        stored["case"],
        stored["batch"],
        [_entry(one) for one in stored["entries"]],
        memory=[Memory(**one) for one in stored["memory"]],
        facts=stored.get("facts", {}),
        left_out=stored.get("left_out", {}),
        floor_seconds=stored["floor_seconds"],
    )


def _entry(stored: Mapping[str, Any]) -> Entry:
    known = {field.name for field in dataclasses.fields(Entry)}
    fields = {name: value for name, value in stored.items() if name in known}
    if fields["check"] is not None:
        fields["check"] = Check(**fields["check"])
    return Entry(**fields)


def _united(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A file of pytest-benchmark in the form of the others."""
    session = dict(stored[KEY])
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for one in stored["benchmarks"]:
        info, stats = one["extra_info"], one["stats"]
        if "peer" in info:
            entry = {**info, "seconds": stats.get("data") or [stats["median"]]}
            if not stats.get("data") and stats.keys() >= set(STATISTICS):
                # Without --benchmark-save-data only statistics are kept.
                kept = {name: stats[name] for name in STATISTICS}
                entry["facts"] = {**info.get("facts", {}), "statistics": kept}
            found.setdefault((info["operation"], info["case"], info["batch"]), []).append(entry)
    keys = [(one["operation"], one["case"], one["batch"]) for one in session["results"]]
    session["results"] = [
        {**one, "entries": found.get(key, [])} for key, one in zip(keys, session["results"], strict=True)
    ]
    return session


def _lines_as_results(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A file of :mod:`bench.gpu.sampler` in the form of the others: a line there is an entry here."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in stored["lines"]:
        case = {"operation": "sampling", "case": line["case"], "batch": line["batch"], "floor_seconds": None}
        result = found.setdefault((line["case"], line["batch"]), {**case, "entries": [], "memory": [], "left_out": {}})
        if line["left_out"] is not None:
            result["left_out"][line["engine"]] = line["left_out"]
            continue
        check = {"passed": line["passed"], "summary": line["said"]}
        facts = {**line["facts"], "device_seconds": line["device_seconds"]}
        kept = {name: line[name] for name in ("seconds", "exact", "extrapolated")}
        result["entries"].append({"peer": line["engine"], **kept, "check": check, "facts": facts})
    ceilings = {"flops_per_s": {}, "gpu_flops_per_s": stored["gpu_flops_per_s"], "read_bytes_per_s": {}}
    return {**stored, "ceilings": ceilings, "results": list(found.values())}


def benchmark_json(recorder: Recorder, output: dict[str, Any]) -> None:
    """Complete what pytest-benchmark is about to write: ratios and floors, and all that is known of the cases."""
    session = to_json(recorder)
    entries = {
        (one["operation"], one["case"], one["batch"], entry["peer"]): entry
        for one in session["results"]
        for entry in one.pop("entries")
    }
    for one in output["benchmarks"]:
        info = one["extra_info"]
        found = entries.get(tuple(info.get(name) for name in ("operation", "case", "batch", "peer")), {})
        one["extra_info"] = {**info, **{name: value for name, value in found.items() if name != "seconds"}}
    output[KEY] = session


def to_json(recorder: Recorder) -> dict[str, Any]:
    """Everything that was measured, every repeat included."""
    return {
        "format": FORMAT,
        "date": now(),
        "quick": recorder.quick,
        "machine": describe_machine(),
        "load_before": recorder.load,
        "versions": describe_versions(),
        **recorder.source,
        "ceilings": recorder.ceilings.to_json(),
        "results": [_result_json(result, recorder) for result in recorder.results],
    }


def _result_json(result: Result, recorder: Recorder) -> dict[str, Any]:
    floor = None if recorder.quick else result.floor(recorder.ceilings)
    values = dataclasses.asdict(result)
    values["floor_seconds"] = floor
    values["entries"] = [entry_json(result, entry, floor) for entry in result.entries]
    return values


def entry_json(result: Result, entry: Entry, floor: float | None) -> dict[str, Any]:
    """With ratios to the others and to the floor, where it may have them."""
    return {
        **dataclasses.asdict(entry),
        "median": entry.median,
        "over_floor": entry.median / floor if floor and entry.comparable else None,
        "speedup_over": {
            other.peer: ratio for other in result.entries if (ratio := result.speedup(entry, other.peer)) is not None
        },
    }


def free_path(folder: Path) -> Path:
    """A file in the folder, named after date and commit, that does not exist yet."""
    stem = f"{now()[:19].replace(':', '')}-{(describe_commit()['commit'] or 'unknown')[:8]}"
    free = (folder / f"{stem}{suffix}.json" for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
    return next(path for path in free if not path.exists())


def write_json(recorder: Recorder, path: Path) -> None:
    """Everything so far; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(to_json(recorder), indent=1) + "\n")
    part.replace(path)
