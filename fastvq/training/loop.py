"""The training loop that both stages share."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvq._evaluation import in_evaluation
from fastvq._nvtx import annotate
from fastvq.data.base import DOMAIN_DROPOUT, random_words
from fastvq.data.grid import save_grid
from fastvq.distributed import Group, join
from fastvq.errors import ArgumentError, DiskFullError, FastvqError, Terminated, UnavailableError
from fastvq.models import PretrainedModel, load_pretrained
from fastvq.training.batches import StepBatches
from fastvq.training.checkpoint import TrainingState, checkpoint_path, checkpoints, load_checkpoint, save_checkpoint
from fastvq.training.config import TrainConfig, learning_rate
from fastvq.training.ema import WeightAverage
from fastvq.training.gradients import RecordedGradients, gradients, may_record
from fastvq.training.interrupt import DeferredInterrupt
from fastvq.training.log import MetricLog
from fastvq.training.progress import Progress, Show
from fastvq.training.run import RunFolder, open_run, versions
from fastvq.training.task import Task
from fastvq.training.weights import best_validation, describe_start, recorded_start

# Seconds in which a launcher passes on to each process a signal that the system has sent to all.
_REPEATED = 5.0
# What asks a run to stop, and how strongly.
_STOPS: tuple[type[KeyboardInterrupt], ...] = (KeyboardInterrupt, Terminated)


class DivergedError(FastvqError, ArithmeticError):
    """The loss or its gradient is not a finite number."""


def train_in(
    run_dir: str | os.PathLike[str],
    prepare: Callable[[], tuple[Task, dict[str, Any]]],
    build: Callable[[], PretrainedModel],
    config: TrainConfig,
    *,
    resume: bool,
    init_from: str | os.PathLike[str] | None,
    notes: Mapping[str, Any] | None,
    progress: Show,
) -> PretrainedModel:
    """:func:`train` in a folder, by all processes of the group that this one belongs to.

    Args:
        prepare: the task and the description of the run, of arguments that fit together; called once there is a device.

    Raises:
        as :func:`train`, :func:`open_run` and :func:`describe_start`.
    """
    with join() as group:
        with group.together():
            resolve_device(config.device, group)
            task, description = prepare()
            init = describe_start(init_from, description["model"], resume=resume)
        with open_run(Path(run_dir), description, resume=resume, init=init, notes=notes, group=group) as run:
            return train(build, task, config, run, group, progress=progress)


def train(
    build: Callable[[], PretrainedModel],
    task: Task,
    config: TrainConfig,
    run: RunFolder,
    group: Group,
    *,
    progress: Show = False,
) -> PretrainedModel:
    """Train to the end, from the newest checkpoint in the run folder if there is one.

    Everything random comes from ``config.seed``; the caller's generators are left as they are. Ctrl-C or
    SIGTERM ends training after the current step with a checkpoint, and so does data that cannot be read.

    The processes of a group have a share of each batch, of which the losses, gradients and codebook statistics are
    added up, so a step is that of the whole batch up to rounding, however many they are. The first process writes.

    Returns:
        The averaged weights (the weights themselves if ``ema_decay`` is None), in evaluation mode.

    Raises:
        DivergedError: the loss is not finite; no checkpoint of that step is written.
        CorruptFileError: the newest checkpoint is damaged.
        UnavailableError: there is no such device.
        PeerError: another process of the group has failed.
        KeyboardInterrupt: after Ctrl-C; Terminated, a kind of it, after SIGTERM.
    """
    device = resolve_device(config.device, group)
    with _own_generators(device, config.seed):
        finished, steps, newest = group.from_first(
            (run.finished, run.steps, checkpoints(run.checkpoints)[-1:]) if group.first else (False, 0, [])
        )
        if finished:
            return load_pretrained(run.model, device=device)
        config = dataclasses.replace(config, steps=steps)
        with group.together():
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
        for part in (model, *([] if state.average is None else [state.average.model])):
            group.equalise(part.state_dict().values())
        _steps(state, task, config, run, group, progress if group.first else False)
        averaged = model if state.average is None else state.average.model
        assert isinstance(averaged, PretrainedModel)
        with group.together():
            if group.first:
                run.finish(averaged)
        return load_pretrained(run.model, device=device)


def _steps(state: TrainingState, task: Task, config: TrainConfig, run: RunFolder, group: Group, show: Show) -> None:
    model = _shared(state.model, group)
    forward = torch.compile(model) if config.compile else model
    batches = StepBatches(task.load, task.rows, config.batch_size, config.seed, group.share(config.batch_size))
    cuda = state.device.type == "cuda"
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Of axes of length 1, whose stride means nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        interrupt = stack.enter_context(DeferredInterrupt(_REPEATED if group.size > 1 else 0.0))
        log = None
        with group.together():
            if group.first:
                log = stack.enter_context(MetricLog(run.logs, state.step))
        with group.together():
            progress = stack.enter_context(Progress(task, state.step, config.steps, config.batch_size, show=show))

        def checkpoint() -> Path:
            with group.together():
                if log is not None:
                    log.sync()
                    save_checkpoint(run.checkpoints, state, keep=config.keep_checkpoints, versions=versions())
            return checkpoint_path(run.checkpoints, state.step)

        recorded = RecordedGradients(state, forward, task, config) if may_record(state, config, group) else None
        reports = _Reports(state, task, config, run, log, batches, group, progress)
        with _kept(state, checkpoint):
            reports.before_first_step()
        remaining = range(state.step, config.steps)
        stream = batches.iterate(remaining, num_workers=config.num_workers, pin_memory=cuda)
        while state.step < config.steps:
            batch, failure = None, None
            progress.begin_step()
            try:
                with annotate("load"):
                    batch = next(stream)
            except Exception as error:
                failure = error
            with _kept(state, checkpoint):
                group.agree(failure)
            assert batch is not None
            for settings in state.optimizer.param_groups:
                settings["lr"] = learning_rate(state.step, config)
            _seed_dropout(state, config, group)
            metrics = recorded(batch) if recorded else gradients(state, forward, task, config, batch, group)
            _check_finite(metrics, state.step, run, group)
            with annotate("step"):
                state.optimizer.step()
                if state.average is not None:
                    state.average.update(state.model, state.step)
            state.step += 1
            state.totals = {name: state.totals.get(name, 0.0) + value for name, value in metrics.items()}
            state.totals_steps += 1
            progress.step(metrics)
            last = state.step == config.steps
            with _kept(state, checkpoint):
                reports.after_step(last=last)
            stop = group.agree(flag=0 if interrupt.requested is None else 1 + _STOPS.index(interrupt.requested))
            if last or stop or _due(state.step, config.checkpoint_every):
                checkpoint()
            if stop:
                raise _STOPS[stop - 1]


class _Reports:
    """What a run writes beside its weights: metrics, pictures, and the best weights."""

    def __init__(
        self,
        state: TrainingState,
        task: Task,
        config: TrainConfig,
        run: RunFolder,
        log: MetricLog | None,
        batches: StepBatches,
        group: Group,
        progress: Progress,
    ) -> None:
        self._state, self._task, self._config, self._run = state, task, config, run
        self._log, self._batches, self._group, self._progress = log, batches, group, progress
        model = state.model if state.average is None else state.average.model
        assert isinstance(model, PretrainedModel)
        self._evaluated = model
        self._means: dict[str, float] = {}

    def before_first_step(self) -> None:
        """Make up for what an error or a shorter run left out after the step that the checkpoint is of."""
        state = self._state
        if state.step == 0:
            return
        last = state.step == self._config.steps
        logged = [] if self._log is None else [s for s in ("train", "validation") if self._log.has(state.step, s)]
        logged = self._group.from_first(logged)
        unlogged = last and state.totals_steps > 0 and "train" not in logged
        unvalidated = (last or self._validation_due()) and "validation" not in logged
        if unlogged:
            self._training()
        if unvalidated:
            self._validation()
        if last and (unlogged or unvalidated):
            self._picture()

    def after_step(self, *, last: bool) -> None:
        if last or self._state.step % self._config.log_every == 0:
            self._training()
        if last or self._validation_due():
            self._validation()
        if last or _due(self._state.step, self._config.image_every):
            self._picture()

    def _validation_due(self) -> bool:
        if self._config.validate_every is not None:
            return _due(self._state.step, self._config.validate_every)
        return self._batches.epoch(self._state.step) > self._batches.epoch(self._state.step - 1)

    def _training(self) -> None:
        state = self._state
        means = {name: total / state.totals_steps for name, total in state.totals.items()}
        rate = state.optimizer.param_groups[0]["lr"]
        with self._group.together():
            if self._log is not None:
                self._log.write(state.step, "train", {**means, "learning_rate": rate})
                self._progress.line(state.step, means)
        state.totals, state.totals_steps, self._means = {}, 0, means

    def _validation(self) -> None:
        state, criterion = self._state, self._task.criterion
        with _evaluation(self._evaluated) as model, annotate("validate"):
            values = self._task.validate(model, state.device, self._group)
        if not values:
            self._progress.judge(state.step, self._means)
            return
        with self._group.together():
            if self._log is not None:
                best, value = best_validation(self._run.path), values[criterion]
                better = not math.isnan(value) and (best is None or value < best["value"])
                if better:
                    self._run.keep_best(self._evaluated, state.step, criterion, value)
                self._log.write(state.step, "validation", {"epoch": self._batches.epoch(state.step), **values})
                self._progress.validated(state.step, values, best=better)

    def _picture(self) -> None:
        state = self._state
        with self._group.together():
            if not self._group.first:
                return
            with _evaluation(self._evaluated) as model:
                picture = self._task.picture(model, state.device, state.step)
            if picture is not None:
                path = self._run.images / f"{picture.name}_{state.step:08d}.png"
                save_grid(path, picture.images, picture.columns, captions=picture.captions, overwrite=True)


@contextlib.contextmanager
def _kept(state: TrainingState, checkpoint: Callable[[], Path]) -> Iterator[None]:
    """Where data cannot be read inside the block, the steps finished before are kept, and the error says so."""
    try:
        yield
    except Exception as error:
        if state.step and not isinstance(error, DiskFullError):
            error.add_note(f"The {state.step} finished steps are in {checkpoint()}; mend the data and resume.")
        raise


def _shared(model: nn.Module, group: Group) -> nn.Module:
    """A model whose gradients become the means over processes."""
    if group.size == 1:
        return model
    # Codebooks and their averages are moved by the statistics of all processes, and are the same already.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(model, **options)


def _seed_dropout(state: TrainingState, config: TrainConfig, group: Group) -> None:
    """Other masks on each process. The first one draws as a single process would, and its generator is kept."""
    if group.first:
        return
    word = random_words(config.seed, state.step, DOMAIN_DROPOUT, group.rank, 1)[0, 0]
    torch.default_generator.manual_seed(int(word >> np.uint64(1)))
    if state.device.type == "cuda":
        torch.cuda.manual_seed(int(word >> np.uint64(1)))


def _check_finite(metrics: dict[str, float], step: int, run: RunFolder, group: Group) -> None:
    for name in ("loss", "grad_norm"):
        value = metrics.get(name, 0.0)
        if not math.isfinite(value):
            kept = checkpoints(run.checkpoints)
            where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            error = DivergedError(
                f"step {step + 1}: {name} is {value}; {where}. A lower learning_rate, a longer warm-up or a smaller "
                "grad_clip may help, in a new run."
            )
            group.agree(error)  # metrics, and so the error, are those of all processes


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def resolve_device(name: str | None, group: Group | None = None) -> torch.device:
    """The device to train on: of several processes on a machine, each takes the GPU of its own number.

    Raises:
        ArgumentError: a kind of device that training does not support, or one GPU for several processes.
        UnavailableError: there is no such device here.
    """
    group = group or Group()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device: expected 'cpu' or 'cuda', got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UnavailableError(f"device: {name!r} was asked for, but PyTorch finds no CUDA device")
    count, index = torch.cuda.device_count(), device.index
    if group.size > 1:
        if index is not None:
            raise ArgumentError(f"device: expected 'cuda' for {group.size} processes, each with its own, got {name!r}")
        index = group.local_rank
        if index >= count:
            raise UnavailableError(f"device: process {index} of this machine needs a GPU of its own, there are {count}")
    index = torch.cuda.current_device() if index is None else index
    if index >= count:
        raise UnavailableError(f"device: {name!r} was asked for, there are {count}")
    return torch.device("cuda", index)


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
