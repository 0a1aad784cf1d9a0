"""Samples with the fastvq that this process imports, as `bench.before` asks: a line of JSON for every question.

It reads ``path`` of a saved prior or pipeline, ``threads``, ``n``, and ``arguments``, a file with those of the call. It
answers with seconds and the file of the codes of all levels, written after the clock has stopped.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq.models import PixelSNAIL


def main() -> None:
    print(json.dumps({"fastvq": fastvq.__file__}), flush=True)
    models: dict[tuple[str, int], Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        path, threads, n = question["path"], question["threads"], question["n"]
        arguments = torch.load(question["arguments"], weights_only=True)
        torch.set_num_threads(threads)
        if (path, threads) not in models:
            # Engines keep weights packed for one setting only; and those of large priors are not to pile up.
            models = {known: model for known, model in models.items() if known[0] == path}
            models[path, threads] = load(path)
        model = models[path, threads]
        whole = isinstance(model, fastvq.Pipeline)
        torch.zeros(1 << 18).sum()  # starts the threads
        start = time.perf_counter()
        found = model.sample(n, **arguments) if whole else fastvq.sample(model, n, **arguments)
        seconds = time.perf_counter() - start
        answer = Path(question["arguments"]).with_suffix(".codes")
        torch.save(list(found.codes) if whole else [found], answer)
        print(json.dumps({"seconds": seconds, "codes": str(answer)}), flush=True)


def load(path: str) -> Any:
    """A prior from its folder, or the pipeline of that name."""
    return PixelSNAIL.from_pretrained(path) if Path(path).is_dir() else fastvq.Pipeline.from_pretrained(path)


if __name__ == "__main__":
    main()
