"""What several processes draw beside one of as many threads: ``python -m bench.parts --out bench/results/parts``.

The shipped digits, drawn in parts as ``fastvq sample --shard I/N`` does, and by one process with N threads, in turns.
What is timed begins when every process has loaded the models and drawn a few samples. The codes must be the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.files import free_path
from bench.machine import describe_commit, describe_machine, describe_versions, now
from fastvq import Pipeline
from fastvq.sampling import Shard, merge_samples, sample_shard

_WARM = 64


def _draw(link: Connection, shard: Shard, threads: int, samples: int, folder: str) -> None:
    """Draw a part once told to, and say when it is there."""
    torch.set_num_threads(threads)
    pipeline = Pipeline.from_pretrained("digits")
    pipeline.sample(_WARM, label=torch.arange(_WARM) % 10, seed=0)
    link.send("ready")
    link.recv()
    sample_shard(pipeline, samples, shard, folder, seed=0)
    link.send("done")


def timed(processes: int, threads: int, samples: int, folder: Path) -> float:
    """Seconds that all parts take."""
    context = multiprocessing.get_context("spawn")
    links, workers = [], []
    for index in range(processes):
        link, theirs = context.Pipe()
        workers.append(
            context.Process(target=_draw, args=(theirs, Shard(index, processes), threads, samples, str(folder)))
        )
        links.append(link)
    for worker in workers:
        worker.start()
    _all(links, Connection.recv)
    began = time.perf_counter()
    _all(links, lambda link: link.send("go"))
    _all(links, Connection.recv)
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return seconds


def _all(links: list[Any], act: Callable[[Any], object]) -> None:
    for link in links:
        act(link)


def main() -> None:
    """Print the ratio, and write all to a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"one process": [], "parts": []}
    with tempfile.TemporaryDirectory(prefix="fastvq-parts-") as name:
        root = Path(name)
        for turn in range(arguments.turns):
            merged = []
            for kind, (processes, threads) in {
                "one process": (1, arguments.processes),
                "parts": (arguments.processes, 1),
            }.items():
                folder = root / f"{turn} {kind}"
                seconds[kind].append(timed(processes, threads, arguments.samples, folder))
                merged.append(
                    (merge_samples(folder, root / f"{turn} {kind} merged") / "codes.safetensors").read_bytes()
                )
            if merged[0] != merged[1]:
                raise SystemExit("the codes differ: no ratio")
            print(json.dumps({kind: values[-1] for kind, values in seconds.items()}), flush=True)
    pairs = [one / parts for one, parts in zip(*seconds.values(), strict=True)]
    result = {
        "samples": arguments.samples,
        "processes": arguments.processes,
        "seconds": seconds,
        "throughput of parts to that of one process": {
            "median": statistics.median(pairs),
            "least": min(pairs),
            "most": max(pairs),
        },
    }
    print(json.dumps(result["throughput of parts to that of one process"]))
    source = {"date": now(), "machine": describe_machine(), "versions": describe_versions(), **describe_commit()}
    path = free_path(arguments.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**source, "results": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
