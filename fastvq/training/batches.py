"""Which rows make up each step's batch, and the processes that may load them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvq.data.base import DOMAIN_ORDER, permutation
from fastvq.errors import FastvqError

Batch = tuple[Tensor, ...]
# (rows, epoch of each row) -> tensors of the batch
LoadBatch = Callable[[np.ndarray, np.ndarray], Batch]


_MOST_WORKERS = 8
_SHARED_MEMORY = Path("/dev/shm")
# Batches that PyTorch has each of its loading processes hold ready, and one that it makes.
_AHEAD = 3


def suggested_workers(device: str | torch.device, batch_bytes: int, *, decodes: bool) -> int:
    """How many processes should load batches of images where nobody has said it; no result depends on it.

    None where images are decoded already, and none on a CPU, where training keeps all cores busy. Beside a GPU the
    cores that this process may use, divided by the processes of its group on this machine, less one for training, at
    most 8, and no more than have room for their batches in shared memory, which containers often have little of.

    Args:
        batch_bytes: size of a batch of this process.
        decodes: whether images are decoded from their files.
    """
    if not decodes or torch.device(device).type == "cpu":
        return 0
    count = _usable_cores() // max(1, _processes_here()) - 1
    if _SHARED_MEMORY.is_dir():
        count = min(count, shutil.disk_usage(_SHARED_MEMORY).free // 2 // (_AHEAD * max(1, batch_bytes)))
    return max(0, min(count, _MOST_WORKERS))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes_here() -> int:
    """As torchrun says; other launchers give each process cores of its own."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


class StepBatches(Dataset[Any]):
    """The batch of every step.

    The data form an endless stream in which epoch e is a permutation keyed by (seed, e); step s takes the positions
    s * batch_size .. (s + 1) * batch_size - 1 of it. So every batch is full, every row comes once per epoch, and the
    place to go on from is the step number. ``share`` are the items of each batch that this process computes.
    """

    def __init__(self, load: LoadBatch, rows: int, batch_size: int, seed: int, share: slice = slice(None)) -> None:
        self._load, self._rows, self._batch_size, self._seed, self._share = load, rows, batch_size, seed, share
        self._orders: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of this process's share of a step's batch, and the epoch that each belongs to: int64 [B]."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)[self._share]
        epochs, places = positions // self._rows, positions % self._rows
        needed = np.unique(epochs).tolist()
        self._orders = {
            e: self._orders[e] if e in self._orders else permutation(self._rows, self._seed, e, DOMAIN_ORDER)
            for e in needed
        }
        rows = np.empty_like(places)
        for e in needed:
            rows[epochs == e] = self._orders[e][places[epochs == e]]
        return rows, epochs

    def __getitem__(self, step: int) -> Batch:
        return self._load(*self.rows(step))

    def epoch(self, step: int) -> int:
        """Epochs completed after that many steps."""
        return step * self._batch_size // self._rows

    def iterate(self, steps: range, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        if num_workers == 0:
            yield from (self[step] for step in steps)
            return
        loader = DataLoader(
            _Guarded(self),
            batch_size=None,
            sampler=steps,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_own_signals,
            # Without its own generator the loader would draw from the one that dropout uses.
            generator=torch.Generator().manual_seed(0),
        )
        for item in loader:
            if isinstance(item, FastvqError):
                raise item
            yield tuple(item)


class _Guarded(Dataset[Any]):
    """Hands mistakes of the user on as values: the loader would bury their message in a worker's traceback."""

    def __init__(self, batches: StepBatches) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> Batch | FastvqError:
        try:
            return self._batches[step]
        except FastvqError as error:
            return error


def _own_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the training process ends the workers when it is done with them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
