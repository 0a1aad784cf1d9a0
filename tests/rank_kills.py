"""Kills processes of training groups at random moments, goes on with another number of them, and compares the end.

``python -m tests.rank_kills --kills 100 --seed 0``: a share of the signals are SIGTERM and SIGINT, the others SIGKILL,
each to one process of a group of one to four. As launchers do, the others are asked to end once one has. The weights
must be those of one process that nobody disturbed, up to rounding, and its log must have the same lines.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from group_helpers import start_group
from safetensors.torch import load_file
from training_helpers import VQVAE_CONFIG, Noise, metrics, train_config

from fastvq.data import Augment
from fastvq.training import train_vqvae

MODEL = dataclasses.replace(VQVAE_CONFIG, codebook_init="kmeans", revive_below=0.9)
CONFIG = train_config(steps=12, accumulate=1, learning_rate=1e-3, batch_size=6, checkpoint_every=4)
BOUND = 5e-6
# Seconds that a launcher gives processes which it has asked to end.
GRACE = 20.0


def training(run: Path) -> Callable[[int], None]:
    """Begin the run in a folder, or go on with it."""
    resume = (run / "config.json").is_file()

    def work(rank: int) -> None:
        train_vqvae(Noise(), MODEL, CONFIG, run, augment=Augment(max_shift=1, horizontal_flip=True), resume=resume)

    return work


def end_as_launcher(processes: list[int]) -> tuple[list[int], bool]:
    """Statuses of all processes; once one has ended badly the others get SIGTERM, and SIGKILL if that is not enough.

    Returns:
        the statuses, and whether SIGKILL was needed.
    """
    statuses: dict[int, int] = {}
    asked: float | None = None
    forced = False
    while len(statuses) < len(processes):
        left = [process for process in processes if process not in statuses]
        for process in left:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                statuses[process] = os.waitstatus_to_exitcode(status)
        left = [process for process in left if process not in statuses]
        number = None
        if asked is None and any(statuses.values()):
            asked, number = time.monotonic(), signal.SIGTERM
        elif asked is not None and time.monotonic() - asked > GRACE and left:
            asked, number, forced = time.monotonic(), signal.SIGKILL, True
        for process in left if number is not None else ():
            os.kill(process, number)
        time.sleep(0.01)
    return [statuses[process] for process in processes], forced


def trial(root: Path, expected: Path, seconds: float, tally: collections.Counter[str]) -> list[str]:
    run, said, faults = root / "run", root / "said", []
    for _ in range(random.choice((1, 1, 2, 3))):
        processes = start_group(random.randint(1, 4), said, training(run))
        time.sleep(random.uniform(0, seconds * len(processes)))
        number = random.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), (8, 1, 1))[0]
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(processes), number)
        statuses, forced = end_as_launcher(processes)
        tally["too late" if not any(statuses) else number.name] += 1
        tally["hung"] += forced
        if forced and (run / "checkpoints").is_dir():  # before that they may still be looking for each other
            faults.append(f"{number.name}: others had to be killed, {statuses}")
    statuses, _ = end_as_launcher(start_group(random.randint(1, 4), said, training(run)))
    if any(statuses):
        texts = [path.read_text()[-500:] for path in sorted(said.glob("errors*"))]
        return [*faults, f"going on ended with {statuses}: {texts}"]
    there, here = (load_file(folder / "model" / "model.safetensors") for folder in (expected, run))
    far = [name for name, tensor in there.items() if (tensor - here[name]).abs().max() > BOUND]
    if far:
        faults.append(f"weights differ in {far}")
    lines = [[(line["step"], line["split"]) for line in metrics(folder)] for folder in (expected, run)]
    if lines[0] != lines[1]:
        faults.append(f"the log has {lines[1]}, expected {lines[0]}")
    left = [str(path) for path in run.rglob(".*")]
    if left:
        faults.append(f"left {left}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    tally: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fastvq-ranks-") as name:
        expected = Path(name) / "expected"
        training(expected)(0)
        began = time.monotonic()
        training(Path(name) / "again")(0)  # which finds everything imported
        seconds = time.monotonic() - began
        print(f"undisturbed {seconds:.1f} s", flush=True)
        while sum(tally[kind] for kind in ("SIGKILL", "SIGTERM", "SIGINT")) < arguments.kills:
            root = Path(name) / "trial"
            found = trial(root, expected, seconds, tally)
            tally["trials"] += 1
            print(f"trial {tally['trials']}: {time.monotonic() - began:.0f} s, {dict(tally)}", flush=True)
            for fault in found:
                print(f"FAULT in trial {tally['trials']}: {fault}", flush=True)
            faults += found
            shutil.rmtree(root)
    print(", ".join(f"{kind} {count}" for kind, count in sorted(tally.items())) + f", faults {len(faults)}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
