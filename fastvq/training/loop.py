"""The training loop that both stages share."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastvq._evaluation import in_evaluation
from fastvq._nvtx import annotate
from fastvq.data.grid import save_grid
from fastvq.errors import ArgumentError, DiskFullError, FastvqError, UnavailableError
from fastvq.models import PretrainedModel, load_pretrained
from fastvq.training.batches import Batch, StepBatches
from fastvq.training.checkpoint import TrainingState, checkpoints, load_checkpoint, save_checkpoint
from fastvq.training.config import TrainConfig, learning_rate
from fastvq.training.ema import WeightAverage
from fastvq.training.interrupt import DeferredInterrupt
from fastvq.training.log import MetricLog
from fastvq.training.run import RunFolder, versions
from fastvq.training.weights import best_validation, recorded_start


class DivergedError(FastvqError, ArithmeticError):
    """The loss or its gradient is not a finite number."""


class Picture(NamedTuple):
    """A grid of images [N, C, H, W] in [-1, 1] to be written while training."""

    name: str
    images: Tensor
    columns: int | None


class Task(Protocol):
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

    def accumulation(self, model: nn.Module) -> AbstractContextManager[None]:
        """Wraps the passes of a step whose batch is cut into parts."""

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Validation metrics; empty without validation data."""

    def picture(self, model: nn.Module, device: torch.device, step: int) -> Picture | None: ...


def train(
    build: Callable[[], PretrainedModel], task: Task, config: TrainConfig, run: RunFolder, *, progress: bool = False
) -> PretrainedModel:
    """Train to the end, from the newest checkpoint in the run folder if there is one.

    Everything random comes from ``config.seed``; the caller's generators are left as they are. Ctrl-C or
    SIGTERM ends training after the current step with a checkpoint, and so does data that cannot be read.

    Returns:
        The averaged weights (the weights themselves if ``ema_decay`` is None), in evaluation mode.

    Raises:
        DivergedError: the loss is not finite; no checkpoint of that step is written.
        CorruptFileError: the newest checkpoint is damaged.
        UnavailableError: there is no such device.
        KeyboardInterrupt: after Ctrl-C; Terminated, a kind of it, after SIGTERM.
    """
    device = resolve_device(config.device)
    with _own_generators(device, config.seed):
        if run.finished:
            return load_pretrained(run.model, device=device)
        config = dataclasses.replace(config, steps=run.steps)
        newest = checkpoints(run.checkpoints)[-1:]
        start = None if newest else recorded_start(run.path, run.record())
        model = build().to(device).train()
        if start is not None:
            model.load_state_dict(start)
        state = TrainingState(
            model=model,
            average=None if config.ema_decay is None else WeightAverage(model, config.ema_decay),
            optimizer=_optimizer(model, config),
            device=device,
            step=0,
            totals={},
            totals_steps=0,
        )
        if newest:
            load_checkpoint(newest[0], state)
        _steps(state, task, config, run, progress)
        averaged = model if state.average is None else state.average.model
        assert isinstance(averaged, PretrainedModel)
        run.finish(averaged)
        return load_pretrained(run.model, device=device)


def _steps(state: TrainingState, task: Task, config: TrainConfig, run: RunFolder, progress: bool) -> None:
    from tqdm import tqdm

    forward = torch.compile(state.model) if config.compile else state.model
    batches = StepBatches(task.load, task.rows, config.batch_size, config.seed)
    cuda = state.device.type == "cuda"
    with (
        DeferredInterrupt() as interrupt,
        MetricLog(run.logs, state.step) as log,
        tqdm(total=config.steps, initial=state.step, disable=not progress, file=sys.stderr) as bar,
    ):

        def checkpoint() -> Path:
            log.sync()
            return save_checkpoint(run.checkpoints, state, keep=config.keep_checkpoints, versions=versions())

        reports = _Reports(state, task, config, run, log, batches)
        with _kept(state, checkpoint):
            reports.before_first_step()
        remaining = range(state.step, config.steps)
        stream = batches.iterate(remaining, num_workers=config.num_workers, pin_memory=cuda)
        while state.step < config.steps:
            with _kept(state, checkpoint), annotate("load"):
                batch = next(stream)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(state.step, config)
            metrics = _gradients(state, forward, task, config, batch)
            _check_finite(metrics, state.step, run)
            with annotate("step"):
                state.optimizer.step()
                if state.average is not None:
                    state.average.update(state.model, state.step)
            state.step += 1
            state.totals = {name: state.totals.get(name, 0.0) + value for name, value in metrics.items()}
            state.totals_steps += 1
            last = state.step == config.steps
            with _kept(state, checkpoint):
                reports.after_step(last=last)
            if last or interrupt.requested or _due(state.step, config.checkpoint_every):
                checkpoint()
            bar.set_postfix({"loss": f"{metrics['loss']:.4f}"}, refresh=False)
            bar.update()
            if interrupt.requested:
                raise interrupt.requested


class _Reports:
    """What a run writes beside its weights: metrics, pictures, and the best weights."""

    def __init__(
        self,
        state: TrainingState,
        task: Task,
        config: TrainConfig,
        run: RunFolder,
        log: MetricLog,
        batches: StepBatches,
    ) -> None:
        self._state, self._task, self._config, self._run = state, task, config, run
        self._log, self._batches = log, batches
        model = state.model if state.average is None else state.average.model
        assert isinstance(model, PretrainedModel)
        self._evaluated = model

    def before_first_step(self) -> None:
        """Make up for what an error or a shorter run left out after the step that the checkpoint is of."""
        state = self._state
        if state.step == 0:
            return
        last = state.step == self._config.steps
        unlogged = last and state.totals_steps > 0 and not self._log.has(state.step, "train")
        unvalidated = (last or self._epoch_ends()) and not self._log.has(state.step, "validation")
        if unlogged:
            self._training()
        if unvalidated:
            self._validation()
        if last and (unlogged or unvalidated):
            self._picture()

    def after_step(self, *, last: bool) -> None:
        if last or self._state.step % self._config.log_every == 0:
            self._training()
        if last or self._epoch_ends():
            self._validation()
        if last or _due(self._state.step, self._config.image_every):
            self._picture()

    def _epoch_ends(self) -> bool:
        return self._batches.epoch(self._state.step) > self._batches.epoch(self._state.step - 1)

    def _training(self) -> None:
        state = self._state
        means = {name: total / state.totals_steps for name, total in state.totals.items()}
        rate = state.optimizer.param_groups[0]["lr"]
        self._log.write(state.step, "train", {**means, "learning_rate": rate})
        state.totals, state.totals_steps = {}, 0

    def _validation(self) -> None:
        state, criterion = self._state, self._task.criterion
        with _evaluation(self._evaluated) as model, annotate("validate"):
            values = self._task.validate(model, state.device)
        if not values:
            return
        best, value = best_validation(self._run.path), values[criterion]
        if not math.isnan(value) and (best is None or value < best["value"]):
            self._run.keep_best(self._evaluated, state.step, criterion, value)
        self._log.write(state.step, "validation", {"epoch": self._batches.epoch(state.step), **values})

    def _picture(self) -> None:
        state = self._state
        with _evaluation(self._evaluated) as model:
            picture = self._task.picture(model, state.device, state.step)
        if picture is not None:
            path = self._run.images / f"{picture.name}_{state.step:08d}.png"
            save_grid(path, picture.images, picture.columns, overwrite=True)


@contextlib.contextmanager
def _kept(state: TrainingState, checkpoint: Callable[[], Path]) -> Iterator[None]:
    """Where data cannot be read inside the block, the steps finished before are kept, and the error says so."""
    try:
        yield
    except Exception as error:
        if state.step and not isinstance(error, DiskFullError):
            error.add_note(f"The {state.step} finished steps are in {checkpoint()}; mend the data and resume.")
        raise


def _gradients(
    state: TrainingState, forward: Callable[..., Any], task: Task, config: TrainConfig, batch: Batch
) -> dict[str, float]:
    """Fill the gradients of one step; returns its metrics."""
    state.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, float] = {}
    parts = zip(*(tensor.split(config.batch_size // config.accumulate) for tensor in batch), strict=True)
    with task.accumulation(state.model) if config.accumulate > 1 else contextlib.nullcontext():
        for part in parts:
            moved = tuple(tensor.to(state.device, non_blocking=True) for tensor in part)
            with torch.autocast(state.device.type, dtype=torch.bfloat16, enabled=config.bf16), annotate("forward"):
                loss, metrics = task.loss(forward, moved)
            with annotate("backward"):
                (loss / config.accumulate).backward()
            # One transfer for all of them: on a GPU each one waits for the device.
            values = torch.stack([loss.detach().float(), *(value.detach().float() for value in metrics.values())])
            for name, value in zip(["loss", *metrics], values.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value / config.accumulate
    if config.grad_clip is not None:
        totals["grad_norm"] = float(nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip))
    return totals


def _check_finite(metrics: dict[str, float], step: int, run: RunFolder) -> None:
    for name in ("loss", "grad_norm"):
        value = metrics.get(name, 0.0)
        if not math.isfinite(value):
            kept = checkpoints(run.checkpoints)
            where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise DivergedError(
                f"step {step + 1}: {name} is {value}; {where}. A lower learning_rate, a longer warm-up or a smaller "
                "grad_clip may help, in a new run."
            )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def resolve_device(name: str | None) -> torch.device:
    """The device to train on.

    Raises:
        ArgumentError: a kind of device that training does not support.
        UnavailableError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device: expected 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnavailableError(f"device: {name!r} was asked for, but PyTorch finds no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UnavailableError(f"device: {name!r} was asked for, there are {torch.cuda.device_count()}")
    return device


def _generators_kept(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng([device.index] if device.type == "cuda" else [])


@contextlib.contextmanager
def _own_generators(device: torch.device, seed: int) -> Iterator[None]:
    with _generators_kept(device):
        # Not torch.manual_seed: it would seed every other GPU as well, which nobody restores.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """The model to evaluate, which leaves no trace in training: neither in its generators nor in the model's mode."""
    devices = {parameter.device for parameter in model.parameters()}
    with _generators_kept(devices.pop()), torch.no_grad():
        yield in_evaluation(model)
