"""Memory of training, measured beside what is predicted: ``python -m bench.training --out bench/results/memory``.

Every case trains in processes of its own, see :mod:`bench.memory`, twice: where the C library maps every tensor by
itself and gives it back at once, which is what a prediction is about, and as the library does by default, where holes
between tensors below 32 MB stay its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor, nn

from bench.files import free_path
from bench.harness import Memory, fresh_process
from bench.machine import describe_commit, describe_machine, describe_versions, now
from fastvq.distributed import Group
from fastvq.models import PRESETS, build
from fastvq.training import TrainConfig
from fastvq.training.batches import Batch
from fastvq.training.loop import train
from fastvq.training.memory import blank_task, training_memory
from fastvq.training.run import open_run
from fastvq.training.task import Task

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
# What a process takes for good, as libraries do, it has taken after some steps.
_STEPS = 3


@dataclass(frozen=True)
class TrainingCase:
    """Training a preset on zeros.

    Attributes:
        size: of an autoencoder's images.
        settings: other fields of TrainConfig.
    """

    preset: str
    batch: int
    size: tuple[int, int] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        size = [] if self.size is None else [f"{self.size[0]}x{self.size[1]}"]
        return "-".join(
            ["train", self.preset, f"b{self.batch}", *size, *(f"{k}{v:g}" for k, v in self.settings.items())]
        )

    def config(self, steps: int) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_size=self.batch,
            validation_fraction=0.0,
            image_every=None,
            checkpoint_every=None,
            device="cpu",
            **self.settings,
        )

    @property
    def predicted(self) -> int:
        return training_memory(PRESETS[self.preset][1], self.config(1), image_size=self.size).peak

    def warmth(self) -> TrainingCase:
        """A tiny case after which the libraries that this one needs are there."""
        preset = "tiny" if self.size else "tiny-pixelcnn" if "pixelcnn" in self.preset else "tiny-bottom"
        return TrainingCase(preset, 4, self.size and (32, 32), self.settings)

    def train(self, before_step: Callable[[], None]) -> None:
        """Some steps; ``before_step`` is called before each."""
        model, config = PRESETS[self.preset][1], self.config(_STEPS)
        task = _Told(blank_task(model, config, self.batch * _STEPS, self.size), before_step)
        record = {"model": model.to_dict(), "train": config.to_dict(), "data": {}}
        with TemporaryDirectory() as folder, open_run(Path(folder) / "run", record, resume=False) as run:
            train(lambda: build(model), task, config, run, Group())


class _Told:
    """A task that tells when a batch is asked for."""

    def __init__(self, task: Task, before_step: Callable[[], None]) -> None:
        self._task, self._before_step = task, before_step
        self.rows, self.criterion = task.rows, task.criterion
        self.loss, self.validate, self.picture = task.loss, task.validate, task.picture

    def load(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        self._before_step()
        return self._task.load(rows, epochs)

    def accumulation(self, model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        return self._task.accumulation(model)


TRAINING = [
    TrainingCase("tiny", 64, (128, 128)),
    TrainingCase("tiny-single", 64, (128, 128)),
    TrainingCase("digits", 64, (64, 64)),
    TrainingCase("imagenet256", 8, (64, 64)),
    TrainingCase("imagenet128", 4, (64, 64)),
    TrainingCase("tiny-top", 4096),
    TrainingCase("tiny-bottom", 1024),
    TrainingCase("tiny-pixelcnn", 1024),
    TrainingCase("digits-top", 256),
    TrainingCase("digits-top", 1024),
    TrainingCase("digits-bottom", 128),
    TrainingCase("digits-bottom", 128, None, {"bf16": True}),
    TrainingCase("digits-bottom", 256, None, {"accumulate": 4}),
]


def measure(case: TrainingCase, *, mapped: bool = True) -> Memory:
    """Peak in a fresh process, and the prediction."""
    return fresh_process("fastvq", case.id, environment=MAPPED if mapped else {})


def main() -> None:
    """Print a line for each case, and write all to a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    folder = parser.parse_args().out
    source = {"date": now(), "machine": describe_machine(), "versions": describe_versions(), **describe_commit()}
    found = []
    for case in TRAINING:
        tensors, default = measure(case), measure(case, mapped=False)
        found.append(
            {
                "case": case.id,
                "predicted": tensors.predicted,
                "measured": tensors.measured,
                "measured_default_malloc": default.measured,
                "ratio": tensors.measured / (tensors.predicted or 1),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    path = free_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**source, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
