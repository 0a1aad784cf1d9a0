"""What the training loop is told of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastvq.distributed import Group
from fastvq.training.batches import Batch
from fastvq.training.progress import Words


class Picture(NamedTuple):
    """A grid of images to be written while training.

    Attributes:
        name: of the file, without step and ending.
        images: [N, C, H, W] in [-1, 1].
        columns, captions: as of :func:`fastvq.data.image_grid`.
    """

    name: str
    images: Tensor
    columns: int | None = None
    captions: Sequence[str] | None = None


class Task(Words, Protocol):
    """What tells one stage from the other.

    Attributes:
        rows: number of training items.
        criterion: the validation metric by which the best weights are chosen, lower is better.
    """

    rows: int
    criterion: str

    def load(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        """Tensors [B, ...] of some training items, each in the given epoch (from 0)."""

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, a mean over its items, and metrics to log (scalars)."""

    def accumulation(self, model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """Wraps the passes of a step whose batch is cut into parts.

        When it ends, its value holds the metrics that are of the whole batch, of all processes, instead of means.
        """

    def validate(self, model: nn.Module, device: torch.device, group: Group) -> dict[str, float]:
        """Validation metrics, of all processes; empty without validation data."""

    def picture(self, model: nn.Module, device: torch.device, step: int) -> Picture | None: ...
