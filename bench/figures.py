"""The pictures in docs/figures, from recorded results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.drawing import Panel, Picture, Point, Series
from bench.harness import Entry, Result
from bench.recorded import BESIDE, GPU, MACHINES, WIDE, Found, Recorded, Run, ours

# Peers as legends call them, each with a style of its own wherever it is drawn.
_SAMPLERS = {
    "naive": ("naive sampler", 0),
    "torch": ("torch engine", 1),
    "cpu": ("fastvq", 2),
    "cuda": ("fastvq, float32", 2),
    "cuda bf16": ("fastvq, bfloat16 (not exact)", 3),
}
_SEARCHES = {
    "fastvq": 2,
    "eager": 0,
    "torch.compile": 1,
    "faiss-cpu": 3,
    "tiled numpy argmin": 4,
    "vector-quantize-pytorch": 5,
    "chunked addmm": 6,
    "cdist": 7,
}
_GRID_SIDES = {
    "digits-top": 2,
    "digits-bottom": 4,
    "small-strict-top": 16,
    "small-strict-bottom": 32,
    "default-strict-top": 32,
    "default-strict-bottom": 64,
}
_FAMILIES = {"digits": "digits", "small-strict": "64 channels", "default-strict": "256 channels"}
Make = Callable[[Recorded, str], Picture | None]


def speed(recorded: Recorded, machine: str) -> Picture | None:
    """Time per grid against batch, of priors small enough for the naive sampler and of one that is not."""
    titles = {
        "small-strict-top": "16 x 16, attention, 64 channels",
        "small-strict-bottom": "32 x 32, 64 channels",
        "default-strict-bottom": "64 x 64, 256 channels",
    }
    alt = "Time per image against batch size of the naive sampler, the torch engine and fastvq, for three priors"
    return _against_batch(recorded, machine, "speed", titles, ("naive", "torch", "cpu"), alt)


def gpu(recorded: Recorded, machine: str) -> Picture | None:
    """The same on a GPU, by precision."""
    titles = {"default-strict-bottom": "64 x 64, 256 channels", "default-strict-top": "32 x 32, attention"}
    peers = ("naive", "torch", "cuda", "cuda bf16")
    alt = "Time per image against batch size on a GPU, by engine and precision"
    return _against_batch(recorded, machine, "gpu", titles, peers, alt)


def _against_batch(
    recorded: Recorded, machine: str, name: str, titles: dict[str, str], peers: Sequence[str], alt: str
) -> Picture | None:
    panels, runs = [], []
    for case, title in titles.items():
        results, run = _of_one_run(recorded, machine, case)
        if run is None or not any((mine := ours(result)) and mine.peer in peers for result in results):
            continue
        points = {peer: tuple(_per_grid(result, peer) for result in results) for peer in peers}
        panels.append(_panel(title, points, "batch", "time per image"))
        runs.append(run)
    said = "One grid of codes; numbers: times as fast as the naive sampler"
    return _picture(name, alt, said, panels, runs)


def _of_one_run(recorded: Recorded, machine: str, case: str) -> tuple[list[Result], Run | None]:
    """Results of a case at every batch, in the run that counts for most of them, the newest of these."""
    found = [one for (kind, name, _), one in recorded.of(machine).items() if (kind, name) == ("sampling", case)]
    names = [one.run.name for one in found]
    chosen = max(found, key=lambda one: (names.count(one.run.name), one.run.session.date), default=None)
    if chosen is None:
        return [], None
    return sorted((one.result for one in found if one.run is chosen.run), key=lambda one: one.batch), chosen.run


def _per_grid(result: Result, peer: str) -> Point | None:
    """With how many times as fast as the naive sampler it is, if it is what stands for this package."""
    entry = result.entry(peer)
    if entry is None or not _fine(entry):
        return None
    guessed = entry.extrapolated is not None
    times = result.speedup(entry, "naive") if entry is ours(result) else None
    note = "" if times is None else f"{times:.0f}x" if times >= 10 else f"{times:.1f}x"
    return Point(result.batch, entry.median / result.batch, guessed, note)


def _fine(entry: Entry) -> bool:
    """Whether there is nothing wrong with its results, exact or not."""
    return entry.check is None or entry.check.passed


def _panel(title: str, points: dict[str, tuple[Point | None, ...]], x_label: str, y_label: str) -> Panel:
    series = []
    for peer, every in points.items():
        if there := tuple(point for point in every if point is not None):
            label, style = _SAMPLERS[peer]
            series.append(Series(label, there, style))
    ticks = sorted({point.x for one in series for point in one.points})
    return Panel(title, x_label, y_label, tuple(series), ticks=tuple(ticks))


def _picture(
    name: str, alt: str, said: str, panels: Sequence[Panel], runs: Sequence[Run], *, share_y: bool = True
) -> Picture | None:
    if not panels:
        return None
    height = 3.3
    if rows := max(len(panel.rows) for panel in panels):
        height = 1.3 + 0.2 * rows
    caption = f"{said}. {_sources(runs)}."
    files = tuple(dict.fromkeys(run.name for run in runs))
    return Picture(name, alt, caption, files, tuple(panels), share_y, height)


def _sources(runs: Sequence[Run]) -> str:
    """Machines with their versions, and the commits and dates of the runs there."""
    found: dict[str, list[str]] = {}
    for run in {run.name: run for run in runs}.values():
        found.setdefault(f"{run.machine}; {run.versions}", []).append(f"{run.commit}, {run.session.date[:10]}")
    return "; ".join(f"{where}; commit {' and '.join(dict.fromkeys(when))}" for where, when in found.items())


def grid(recorded: Recorded, machine: str) -> Picture | None:
    """Time per grid against its side, both levels of three kinds of priors, at batch 8."""
    panels, runs = [], []
    for family, title in _FAMILIES.items():
        found = [
            (side, one)
            for case, side in _GRID_SIDES.items()
            if case.startswith(family) and (one := recorded.find(machine, "sampling", case, 8)) is not None
        ]
        points = {
            peer: tuple(_at_side(one.result, peer, side) for side, one in found) for peer in ("naive", "torch", "cpu")
        }
        if found:
            panels.append(_panel(title, points, "side of the grid", "time per image"))
            runs += [one.run for _, one in found]
    alt = "Time per image against the side of the grid of codes, for priors of digits, 64 and 256 channels"
    said = "Batch 8; priors have attention, but for the larger grid of 64 and of 256 channels"
    return _picture("grid", alt, said, panels, runs)


def _at_side(result: Result, peer: str, side: int) -> Point | None:
    point = _per_grid(result, peer)
    return None if point is None else Point(side, point.y, point.guessed)


def nearest_code(recorded: Recorded, machine: str) -> Picture | None:
    """Time over the floor against N and K, all peers."""
    by_n = [(n, f"K {k}, D 64, forward + EMA", n) for n, k in ((4096, 512), (65536, 512), (1048576, 512))]
    by_k = [(k, f"K {k}, D 64, forward + EMA", n) for n, k in ((65536, 512), (65536, 8192), (16384, 65536))]
    panels, runs = [], []
    for title, x_label, cases in (
        ("K 512, D 64", "vectors N", by_n),
        ("N 65536 (K 65536: N 16384), D 64", "codes K", by_k),
    ):
        found = [(x, one) for x, case, batch in cases if (one := recorded.find(machine, "nearest code", case, batch))]
        series = []
        for peer, style in _SEARCHES.items():
            points = tuple(
                Point(x, entry.median / one.result.floor_seconds)
                for x, one in found
                if (entry := one.result.entry(peer)) and entry.comparable and one.result.floor_seconds
            )
            if points:
                series.append(Series(peer, points, style))
        if series:
            ticks = tuple(float(x) for x, _ in found)
            panels.append(Panel(title, x_label, "time / floor", tuple(series), "times", ticks))
            runs += [one.run for _, one in found]
    alt = "Time over the floor of nearest code with the EMA update, against the number of vectors and of codes"
    said = "Nearest code and EMA update; floor: 2 N K D operations at the best rate of the session"
    return _picture("nearest-code", alt, said, panels, runs)


def memory(recorded: Recorded, machine: str) -> Picture | None:
    """Peaks of fresh processes beyond model and inputs, and what was predicted."""
    every = [one for one in recorded.of(machine).values() if one.result.memory]
    sampled = [one for one in every if one.result.operation == "sampling" and "strict" in one.result.case]
    searched = [one for one in every if one.result.case == "K 8192, D 64, forward + EMA"]
    titles = {"sampling": sampled, "nearest code + EMA": searched}
    panels = [_memory_panel(title, found) for title, found in titles.items() if found]
    alt = "Measured and predicted memory of sampling and of nearest code"
    said = "Peak of a fresh process beyond model and inputs; nearest code with K 8192 and D 64"
    return _picture("memory", alt, said, panels, [one.run for one in (*sampled, *searched)], share_y=False)


def _memory_panel(title: str, found: Sequence[Found]) -> Panel:
    rows: list[str] = []
    points: dict[str, list[Point]] = {"predicted": [], "measured": []}
    for result, _ in found:
        for one in result.memory:
            if result.operation == "sampling":
                rows.append(f"{_family(result.case)}, {result.case.rpartition('-')[2]}, batch {result.batch}")
            else:
                rows.append(f"N {result.batch}, {one.peer}")
            points["measured"].append(Point(one.measured, len(rows) - 1))
            if one.predicted is not None:
                points["predicted"].append(Point(one.predicted, len(rows) - 1))
    styles = {"predicted": 8, "measured": 2}
    series = tuple(Series(label, tuple(every), styles[label]) for label, every in points.items() if every)
    return Panel(title, "memory", "", series, "bytes", rows=tuple(rows))


def floor(recorded: Recorded, machine: str = "") -> Picture | None:
    """Our time over the floor in every case, a row per operation; all machines unless one is named."""
    rows: list[str] = []
    points: dict[str, list[Point]] = {}
    runs = []
    for place in [machine] if machine else [place for place in MACHINES if place in recorded.machines]:
        for (operation, case, _), one in recorded.of(place).items():
            mine, least = ours(one.result), one.result.floor_seconds
            if mine is None or not mine.comparable or not least or BESIDE in operation:
                continue
            row = operation if operation != "sampling" else f"sampling, {_family(case)}"
            rows += [] if row in rows else [row]
            points.setdefault(place, []).append(Point(mine.median / least, rows.index(row)))
            runs.append(one.run)
    if not rows:
        return None
    styles = dict(zip(MACHINES, (2, 6, 1, 3), strict=True))
    series = tuple(
        Series(MACHINES.get(place, place), tuple(every), styles.get(place, 2)) for place, every in points.items()
    )
    panel = Panel("", "time / floor", "", series, "times", rows=tuple(rows))
    alt = "Time over the floor of every case, by operation and machine"
    return _picture("floor", alt, "A point per case", [panel], runs)


def _family(case: str) -> str:
    return next((words for family, words in _FAMILIES.items() if case.startswith(family.removesuffix("-strict"))), case)


# What is drawn in the documentation, and of which machine; "" for all.
FIGURES: dict[str, tuple[Make, str]] = {
    "speed": (speed, WIDE),
    "grid": (grid, WIDE),
    "nearest-code": (nearest_code, WIDE),
    "memory": (memory, WIDE),
    "floor": (floor, ""),
    "gpu": (gpu, GPU),
}
