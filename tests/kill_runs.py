"""Kills every command at random moments, lets it go on until it is done, and checks that nothing was lost or damaged.

``python tests/kill_runs.py --kills 200 --seed 0``: a share of the kills are SIGTERM and SIGINT, the others SIGKILL. The
result must be, byte for byte, that of a run nobody disturbed; outputs must be whole or absent at any time, and nothing
temporary may be left. Commands run in processes forked from this one, so that starting them takes no time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STEPS = ["--steps", "6", "--batch-size", "4", "--checkpoint-every", "2", "--log-every", "2"]
DIGITS = ["--data", "digits", "--size", "8"]
VQVAE = [*DIGITS, "--preset", "tiny", "--set", "in_channels=1", "--shift", "1", "--validation", "0.02"]
PRELOADED = (
    "fastvq.cli.train",
    "fastvq.cli.evaluate",
    "fastvq.cli.demo",
    "fastvq.cli.generate",
    "fastvq.cli.classify",
    "fastvq.cli.merge",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "PIL.PngImagePlugin",
)
ABSENT_OR_WHOLE = ("samples", "report", "picture.png", "merged")
# Endings of runs that nothing stopped, and of those that the two polite signals did.
ENDINGS = {signal.SIGKILL: (), signal.SIGTERM: (143,), signal.SIGINT: (130,)}


@dataclass(frozen=True)
class Case:
    """A command line in a project folder; ``needs`` are the cases that fill the folder before it."""

    arguments: Sequence[str]
    needs: tuple[str, ...] = ()
    resumes: str | None = None  # the run folder in which config.json says that there is something to resume
    weight: int = 4
    replaces: bool = True  # whether what it wrote is replaced by --overwrite; else the same command goes on


TRAINED = ("train-vqvae", "extract", "train-prior", "train-prior 1")


def sample_part(text: str) -> Case:
    options = ["-n", "300", "--seed", "0", "--out", "parts", "--images", "png"]
    return Case(["sample", "--checkpoint", "my", *options, "--shard", text], TRAINED, replaces=False)


CASES = {
    "train-vqvae": Case(["train-vqvae", "--run", "my", *VQVAE, *STEPS, "--image-every", "3"], (), "my/vqvae"),
    "extract": Case(["extract", "--run", "my"], ("train-vqvae",)),
    "train-prior": Case(
        ["train-prior", "--run", "my", "--level", "0", "--preset", "tiny-top", *STEPS, "--image-every", "3"],
        ("train-vqvae", "extract"),
        "my/prior0",
    ),
    "train-prior 1": Case(
        ["train-prior", "--run", "my", "--level", "1", "--preset", "tiny-bottom", *STEPS],
        ("train-vqvae", "extract", "train-prior"),
        "my/prior1",
    ),
    "train-classifier": Case(
        ["train-classifier", "--run", "my", "--set", "channels=(4,)", "--set", "features=4", *STEPS],
        ("train-vqvae",),
        "my/classifier",
    ),
    "sample": Case(
        ["sample", "--checkpoint", "my", "-n", "12", "--seed", "0", "--out", "samples"],
        TRAINED,
    ),
    "sample png": Case(
        ["sample", "--checkpoint", "my", "-n", "12", "--seed", "0", "--out", "picture.png"],
        TRAINED,
        weight=2,
    ),
    "sample --shard 0": sample_part("0/2"),
    "sample --shard 1": sample_part("1/2"),
    "merge samples": Case(
        ["merge", "parts", "--out", "merged"], (*TRAINED, "sample --shard 0", "sample --shard 1"), weight=2
    ),
    "extract --shard 0": Case(["extract", "--run", "my", "--shard", "0/2"], ("train-vqvae",)),
    "extract --shard 1": Case(["extract", "--run", "my", "--shard", "1/2"], ("train-vqvae",)),
    "merge codes": Case(["merge", "my"], ("train-vqvae", "extract --shard 0", "extract --shard 1"), weight=2),
    "evaluate": Case(
        ["evaluate", "my", "-n", "40", "--keep", "1.0", "0.5", "--no-curves", "--out", "report"],
        ("train-vqvae", "extract", "train-prior", "train-prior 1", "train-classifier"),
        weight=2,
    ),
    "demo": Case(["demo", "--out", "demo", "--effort", "0.002"], (), "demo", weight=1),
}


@dataclass
class Tally:
    trials: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {"SIGKILL": 0, "SIGTERM": 0, "SIGINT": 0})
    late: int = 0
    faults: list[str] = field(default_factory=list)


def start(arguments: Sequence[str], folder: Path) -> int:
    """Fork a process that runs the command in a folder; what it prints goes to files there."""
    from fastvq.cli import main

    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.chdir(folder)
        for number, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = main(arguments if arguments[0] == "merge" else [*arguments, "--quiet"])
    except KeyboardInterrupt:
        status = 130
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(arguments: Sequence[str], folder: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(start(arguments, folder), 0)[1])


def going_on(case: Case, folder: Path) -> list[str]:
    arguments = list(case.arguments)
    if case.resumes is not None:
        run = folder / case.resumes
        begun = run / "data.json" if arguments[0] == "demo" else run / "config.json"
        return [*arguments, "--resume"] if begun.is_file() else arguments
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments and case.replaces else None
    return [*arguments, "--overwrite"] if out is not None and (folder / out).exists() else arguments


def contents(folder: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: everything but times and all checkpoints but the newest of each run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        older = "/checkpoints/" in name and not name.split("/checkpoints/")[1].startswith(newest(path))
        if not path.is_file() or "tfevents" in name or older or name.endswith("report/README.md"):
            continue
        data = path.read_bytes()
        if name.endswith("report/evaluation.json"):
            numbers = json.loads(data)
            data = json.dumps({key: numbers[key] for key in numbers if key not in ("environment", "seconds")}).encode()
        if "/evaluation/features-" in name:  # whose header lists its entries in any order
            header = 8 + int.from_bytes(data[:8], "little")
            data = json.dumps(json.loads(data[8:header]), sort_keys=True).encode() + data[header:]
        found[name] = data
    return found


def newest(path: Path) -> str:
    runs = next(parent for parent in path.parents if parent.name == "checkpoints")
    return max((entry.name for entry in runs.iterdir() if entry.name.startswith("step_")), default="step")


def temporary(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(".*"))


def trial(case: Case, base: Path, folder: Path, expected: dict[str, bytes], seconds: float, tally: Tally) -> None:
    """Kill a command up to three times, let it end, and compare."""
    shutil.copytree(base, folder)
    random_kills = random.choice((1, 1, 2, 3))
    for _ in range(random_kills):
        before = temporary(folder)  # what a SIGKILL left may stay until the command comes to it
        process = start(going_on(case, folder), folder)
        time.sleep(random.uniform(0, seconds))
        number = random.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), (8, 1, 1))[0]
        os.kill(process, number)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status == 0:
            tally.late += 1
            break
        tally.kills[number.name] += 1
        if status not in (-number, *ENDINGS[number]):
            errors = (folder.parent / "errors").read_text(errors="replace")[-800:]
            tally.faults.append(f"{number.name}: status {status}: {errors}")
        left = [name for name in temporary(folder) if name not in before]
        if status in ENDINGS[number] and left:
            tally.faults.append(f"{number.name} left {left}")
        for name in ABSENT_OR_WHOLE:
            there = {path: data for path, data in contents(folder).items() if path.split("/")[0] == name}
            if there and there != {path: data for path, data in expected.items() if path.split("/")[0] == name}:
                tally.faults.append(f"{number.name} left half of {name}: {sorted(there)}")
    status = finish(going_on(case, folder), folder)
    if status:
        errors = (folder.parent / "errors").read_text(errors="replace")[-800:]
        tally.faults.append(f"going on ended with {status}: {errors}")
    found = contents(folder)
    different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if different:
        tally.faults.append(f"differs from the undisturbed run in {different}")
    if temporary(folder):
        tally.faults.append(f"left {temporary(folder)}")


def check_loads(folder: Path) -> None:
    """Models of all runs in a folder load."""
    from fastvq.training import load_weights

    for config in folder.rglob("config.json"):
        load_weights(config.parent)


def run(kills: int, seed: int, names: Sequence[str], root: Path, say: Callable[[str], None]) -> dict[str, Tally]:
    random.seed(seed)
    stop: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: stop.append(number))  # ends after the trial, with the table
    bases: dict[str, Path] = {}
    references: dict[str, tuple[dict[str, bytes], float]] = {}
    tallies = {name: Tally() for name in names}

    def prepare(name: str) -> None:
        """The folder before a command, and what it holds after it."""
        if name in references:
            return
        case = CASES[name]
        for need in case.needs:
            prepare(need)
        bases[name], after = root / f"base {name}", root / f"after {name}"
        bases[name].mkdir()
        for need in case.needs:
            shutil.copytree(root / f"after {need}", bases[name], dirs_exist_ok=True)
        shutil.copytree(bases[name], after)
        began = time.monotonic()
        status = finish(case.arguments, after)
        if status:
            raise SystemExit(f"{name}: the undisturbed run ended with {status}: {(root / 'errors').read_text()}")
        references[name] = contents(after), time.monotonic() - began

    for name in names:
        prepare(name)
        say(f"{name}: undisturbed {references[name][1]:.1f} s")
    count = 0
    while not stop and sum(sum(tally.kills.values()) for tally in tallies.values()) < kills:
        name = random.choices(names, [CASES[name].weight for name in names])[0] if count >= len(names) else names[count]
        count += 1
        tally, folder = tallies[name], root / "trial"
        tally.trials += 1
        before = len(tally.faults)
        trial(CASES[name], bases[name], folder, *references[name], tally)
        try:
            check_loads(folder)
        except Exception as error:
            tally.faults.append(f"does not load: {error!r}")
        for fault in tally.faults[before:]:
            say(f"FAULT in trial {count} of {name}: {fault}")
        shutil.rmtree(folder)
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    import torch

    for module in PRELOADED:
        importlib.import_module(module)
    torch.set_num_threads(1)  # a forked process cannot use OpenMP's other threads
    with tempfile.TemporaryDirectory(prefix="fastvq-kills-") as root:
        tallies = run(
            arguments.kills, arguments.seed, arguments.commands, Path(root), lambda text: print(text, flush=True)
        )
    print(f"{'command':18} {'trials':>6} {'SIGKILL':>8} {'SIGTERM':>8} {'SIGINT':>7} {'too late':>9} {'faults':>7}")
    for name, tally in tallies.items():
        numbers = (tally.kills[kind] for kind in ("SIGKILL", "SIGTERM", "SIGINT"))
        print("{:18} {:6} {:8} {:8} {:7} {:9} {:7}".format(name, tally.trials, *numbers, tally.late, len(tally.faults)))
    return int(any(tally.faults for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
