"""What training takes of memory: one step on tensors that have sizes and no values, whose bytes are counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvq._check import require_positive_int
from fastvq._config import Config
from fastvq.data.base import require_size
from fastvq.distributed import Group
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import ClassifierConfig, HierarchicalVQVAE, PriorConfig, VectorQuantizer, VQVAEConfig, build
from fastvq.models.stored import outline
from fastvq.training.batches import Batch
from fastvq.training.checkpoint import TrainingState
from fastvq.training.classifier import _Classification
from fastvq.training.config import TrainConfig
from fastvq.training.gradients import gradients as gradients_of
from fastvq.training.loop import _optimizer
from fastvq.training.stage1 import _Reconstruction
from fastvq.training.stage2 import _Likelihood
from fastvq.training.task import Task

# Registered operations whose backend on a CPU is PyTorch's operators: what these make on the way is counted too.
_COMPOSED = ("fastvq::causal_conv2d", "fastvq::causal_conv2d_backward")


@dataclass(frozen=True)
class TrainingMemory:
    """What one process takes, in bytes; ``parameters`` is a number.

    Attributes:
        parameters: of the model, moved by the optimiser.
        weights: parameters and buffers, codebooks among them.
        gradients: of the parameters.
        buckets: where DistributedDataParallel adds gradients of several processes up.
        optimizer: two moments of every parameter, and a number of steps for each tensor.
        average: averaged weights, parameters and buffers.
        batch: what is loaded for a step.
        activations: what the forward pass of one part of the batch leaves for the backward pass.
        peak: the most that exists at a time during a step: some of these, and what is made on the way.
    """

    parameters: int
    weights: int
    gradients: int
    buckets: int
    optimizer: int
    average: int
    batch: int
    activations: int
    peak: int


def training_memory(
    model_config: Config, config: TrainConfig, *, image_size: tuple[int, int] | None = None, processes: int = 1
) -> TrainingMemory:
    """Memory of training a model, without allocating it.

    Counted are tensors during a step on a CPU; on a GPU they are the same up to what kernels make on the way. Not
    counted: Python and its libraries, what these take for themselves (rearranged copies inside convolutions, a CUDA
    context), memory that the system's allocator holds without using it, processes that load data, and what comes
    between steps: validation, pictures, checkpoints (which copy weights, averages and moments).

    Args:
        model_config: of an autoencoder, a prior or a classifier.
        config: ``batch_size``, ``accumulate``, ``ema_decay``, ``bf16`` and ``optimizer`` count.
        image_size: (H, W) of an autoencoder's or classifier's images; priors know their grids.
        processes: that have a share of every batch; the largest share counts.

    Raises:
        ArgumentError, ArgumentTypeError: a size that is missing or does not fit, no process, a model that is not
            trained here.
    """
    require_positive_int("processes", processes)
    _check_size(model_config, image_size)
    rows = -(-config.batch_size // processes)
    from torch._subclasses.fake_tensor import FakeTensorMode

    live = _LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        model = build(model_config).train()
        for module in model.modules():
            if isinstance(module, VectorQuantizer):
                module.init = "normal"  # a step after the first, in which codebooks start
        weights = live.bytes
        parameters = list(model.parameters())
        optimizer = _optimizer(model, config)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        gradients = live.bytes - weights
        optimizer.step()  # which makes its moments
        moments = live.bytes - weights - gradients
        optimizer.zero_grad()
        task = _Watched(blank_task(model_config, config, rows, image_size), live)
        batch = task.load(np.arange(rows), np.zeros(rows, dtype=np.int64))
        live.peak = live.bytes
        state = TrainingState(model, None, optimizer, torch.device("cpu"), step=0, totals={}, totals_steps=0)
        gradients_of(state, model, task, config, batch, Group())
        optimizer.step()
    # Both are there all the time, and what is done to them makes nothing.
    average = 0 if config.ema_decay is None else weights
    buckets = gradients if processes > 1 else 0
    return TrainingMemory(
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=weights,
        gradients=gradients,
        buckets=buckets,
        optimizer=moments,
        average=average,
        batch=sum(tensor.nbytes for tensor in batch),
        activations=task.activations,
        peak=live.peak + average + buckets,
    )


def blank_task(model_config: Config, config: TrainConfig, rows: int, image_size: tuple[int, int] | None = None) -> Task:
    """The task that trains such a model, on so many rows of zeros."""
    nothing, training = np.arange(0), np.arange(rows)
    if isinstance(model_config, PriorConfig):
        grids = (*model_config.condition_shapes, model_config.shape)
        codes: Any = _BlankCodes(rows, grids, model_config.num_classes is not None)
        return _Likelihood(codes, None, len(grids) - 1, model_config, config, None)
    assert isinstance(model_config, (VQVAEConfig, ClassifierConfig))
    assert image_size is not None
    images: Any = _BlankImages(rows, model_config.in_channels, image_size)
    if isinstance(model_config, VQVAEConfig):
        return _Reconstruction(images, training, nothing, model_config, config, None)
    return _Classification(images, training, (images, nothing), config, None)


def _check_size(model_config: Config, image_size: tuple[int, int] | None) -> None:
    if isinstance(model_config, PriorConfig):
        if image_size is not None:
            raise ArgumentError(f"image_size: a prior's grids are its own, {model_config.shape}; got {image_size}")
        return
    if not isinstance(model_config, (VQVAEConfig, ClassifierConfig)):
        raise ArgumentTypeError(
            f"model_config: expected that of an autoencoder, a classifier or a prior, got {model_config!r}"
        )
    if image_size is None:
        raise ArgumentError("image_size: this model's memory depends on the size of its images; expected (H, W)")
    require_size("image_size", image_size)
    if isinstance(model_config, VQVAEConfig):
        model = outline(lambda: build(model_config))
        assert isinstance(model, HierarchicalVQVAE)
        model.code_shapes(image_size)


class _LiveBytes(TorchDispatchMode):
    """Counts the tensors that exist, of those without values that are made under it; values that are read are 0.

    Attributes:
        bytes: of all their storages now.
        peak: the most that ``bytes`` was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if func is torch.ops.aten.equal.default:
            return True
        if func.name() in _COMPOSED:
            with self:
                found = func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        else:
            found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        self._storages.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._remove, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _remove(self, size: int) -> None:
        self.bytes -= size


class _Watched:
    """A task that notes what its forward passes leave.

    Attributes:
        activations: bytes, the most of all passes.
    """

    def __init__(self, task: Task, live: _LiveBytes) -> None:
        self._task, self._live, self.activations = task, live, 0
        self.rows, self.criterion = task.rows, task.criterion
        self.load, self.accumulation = task.load, task.accumulation
        self.validate, self.picture = task.validate, task.picture
        self.unit, self.brief, self.summary, self.concern = task.unit, task.brief, task.summary, task.concern

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        before = self._live.bytes
        found = self._task.loss(forward, batch)
        self.activations = max(self.activations, self._live.bytes - before)
        return found


class _BlankImages:
    """As much of a data set of images as training batches take."""

    def __init__(self, rows: int, channels: int, size: tuple[int, int]) -> None:
        self.channels, self.size = channels, size
        self.labels = torch.zeros(rows, dtype=torch.int64)

    def image(self, index: int) -> Tensor:
        return torch.zeros(self.channels, *self.size)


class _BlankCodes:
    """The same of a folder of codes."""

    def __init__(self, rows: int, grids: tuple[tuple[int, int], ...], labelled: bool) -> None:
        self._rows, self._grids = rows, grids
        self.labels = torch.zeros(rows, dtype=torch.int64) if labelled else None

    def __len__(self) -> int:
        return self._rows

    def codes(self, level: int, rows: np.ndarray) -> Tensor:
        return torch.zeros(len(rows), *self._grids[level], dtype=torch.int64)
