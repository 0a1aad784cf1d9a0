"""Gradients of a step: in parts, over processes, or recorded as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvq._nvtx import annotate
from fastvq.distributed import Group
from fastvq.training.batches import Batch
from fastvq.training.checkpoint import TrainingState
from fastvq.training.config import TrainConfig
from fastvq.training.recorded import Recorded
from fastvq.training.task import Task


def gradients(
    state: TrainingState, forward: Callable[..., Any], task: Task, config: TrainConfig, batch: Batch, group: Group
) -> dict[str, float]:
    """Fill the gradients of one step; returns its metrics, of all processes."""
    state.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, float] = {}
    parts = list(zip(*(tensor.tensor_split(config.accumulate) for tensor in batch), strict=True))
    with task.accumulation(state.model) if config.accumulate > 1 else contextlib.nullcontext({}) as of_step:
        for number, part in enumerate(parts, 1):
            moved = tuple(tensor.to(state.device, non_blocking=True) for tensor in part)
            weight = len(part[0]) / config.batch_size
            with contextlib.nullcontext() if number == len(parts) else _unshared(forward):
                loss, metrics = _loss(state, forward, task, config, moved)
                if not weight:
                    # A mean over nothing; its gradients, of no items, are zeros.
                    loss, metrics = loss.nan_to_num(), {name: value.nan_to_num() for name, value in metrics.items()}
                with annotate("backward"):
                    (loss * (weight * group.size)).backward()
            # One transfer for all of them: on a GPU each one waits for the device.
            found = {"loss": loss, **metrics}
            for name, value in zip(found, _stacked(found).tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value * weight
    totals = dict(zip(totals, group.sum(totals.values()), strict=True))
    totals |= {name: float(value) for name, value in of_step.items()}
    if config.grad_clip is not None:
        totals["grad_norm"] = float(nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip))
    return totals


def may_record(state: TrainingState, config: TrainConfig, group: Group) -> bool:
    """Whether the passes of steps may be recorded as a CUDA graph."""
    plain = group.size == 1 and config.accumulate == 1 and not config.compile
    return config.cuda_graph and plain and state.device.type == "cuda"


class RecordedGradients:
    """:func:`gradients` of one process and one part, recorded as a CUDA graph."""

    def __init__(self, state: TrainingState, forward: Callable[..., Any], task: Task, config: TrainConfig) -> None:
        self._state, self._forward, self._task, self._config = state, forward, task, config
        self._names: list[str] = []
        self._passes = Recorded(self._run, state.device)

    def __call__(self, batch: Batch) -> dict[str, float]:
        values = self._passes(batch)
        return dict(zip(self._names, values.tolist(), strict=True))

    def _run(self, batch: Sequence[Tensor]) -> Tensor:
        """Metrics [M]."""
        config = self._config
        self._state.optimizer.zero_grad(set_to_none=True)
        loss, metrics = _loss(self._state, self._forward, self._task, config, tuple(batch))
        with annotate("backward"):
            loss.backward()
        found = {"loss": loss, **metrics}
        if config.grad_clip is not None:
            found["grad_norm"] = nn.utils.clip_grad_norm_(self._state.model.parameters(), config.grad_clip)
        self._names = list(found)
        return _stacked(found)


def _loss(
    state: TrainingState, forward: Callable[..., Any], task: Task, config: TrainConfig, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast(state.device.type, dtype=torch.bfloat16, enabled=config.bf16), annotate("forward"):
        return task.loss(forward, batch)


def _stacked(metrics: Mapping[str, Tensor]) -> Tensor:
    """Scalars as one tensor [M], which takes one transfer."""
    return torch.stack([value.detach().float() for value in metrics.values()])


def _unshared(forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Passes whose gradients stay on this process until those of the last part go with them."""
    module = getattr(forward, "_orig_mod", forward)
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()
