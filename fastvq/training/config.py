"""Settings of a training run, and the learning rate they imply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fastvq._check import require_bool, require_choice, require_number, require_positive_int, require_seed
from fastvq._config import Config
from fastvq.errors import ArgumentError, ArgumentTypeError

# A run may go on with other values of these: they change neither the weights nor what is measured of them, only when.
NEUTRAL_FIELDS = frozenset(
    {
        "cuda_graph",
        "log_every",
        "validate_every",
        "image_every",
        "checkpoint_every",
        "keep_checkpoints",
        "num_workers",
        "device",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How a model is trained.

    Args:
        steps: optimiser steps. A run that goes on may be given another number; from there on the learning rate is that
            of a run of this length.
        batch_size: images (stage 1) or rows of codes (stage 2) per optimiser step, however many parts it is cut into.
        learning_rate: at its peak.
        optimizer: ``adamw`` (decoupled weight decay) or ``adam`` (weight decay as an L2 term in the gradient).
        betas, weight_decay: of the optimiser.
        warmup_steps: steps over which the learning rate rises linearly to its peak.
        final_lr_fraction: the cosine that follows falls to this share of the peak at the end; 1 keeps it constant.
        grad_clip: largest norm of the whole gradient; None: no clipping.
        ema_decay: decay of the moving average of the weights, which is what gets validated and saved; None: the
            weights themselves.
        bf16: forward pass under bfloat16 autocast.
        compile: compile the forward pass with ``torch.compile``.
        cuda_graph: on a GPU, record the passes of a step as a CUDA graph after some steps and replay it, which spares
            small models most of their time; not with ``compile``, ``accumulate``, several processes, or attention
            dropout.
        accumulate: equal parts a batch is cut into, one forward and backward pass each, to save memory. The step is
            that of the whole batch up to rounding (and up to dropout, whose mask is drawn part by part).
        seed: of the initial weights, dropout, the order of the data, the augmentation and the validation split.
        validation_fraction: share of the images held out in stage 1; 0: no validation.
        log_every: steps between two lines of training metrics, each the mean over these steps.
        validate_every: steps between two validations; None: one after every epoch. There is one at the end in any case.
            The weights in ``best/`` are the best of those that were validated.
        image_every: steps between two image grids; None: none but the last.
        checkpoint_every: steps between two checkpoints; None: none but the last.
        keep_checkpoints: how many of the newest checkpoints stay.
        num_workers: processes that load batches; 0: the training process loads them.
        device: None for CUDA if there is any, else the CPU.

    Raises:
        ArgumentError, ArgumentTypeError: naming the field.
    """

    steps: int
    batch_size: int
    learning_rate: float = 3e-4
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1
    grad_clip: float | None = 1.0
    ema_decay: float | None = 0.999
    bf16: bool = False
    compile: bool = False
    cuda_graph: bool = True
    accumulate: int = 1
    seed: int = 0
    validation_fraction: float = 0.1
    log_every: int = 50
    validate_every: int | None = None
    image_every: int | None = 1000
    checkpoint_every: int | None = 1000
    keep_checkpoints: int = 2
    num_workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "steps", "batch_size", "accumulate", "log_every", "keep_checkpoints")
        self._require(require_positive_int, "validate_every", "image_every", "checkpoint_every", optional=True)
        self._require(require_positive_int, "warmup_steps", "num_workers", minimum=0)
        self._require(require_seed, "seed")
        self._require(require_choice, "optimizer", choices=("adamw", "adam"))
        self._require(require_bool, "bf16", "compile", "cuda_graph")
        self._require(require_number, "learning_rate", above=0)
        self._require(require_number, "weight_decay", least=0)
        self._require(require_number, "final_lr_fraction", least=0, most=1)
        self._require(require_number, "validation_fraction", least=0, below=1)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ArgumentTypeError(f"betas: expected a pair of numbers, got {self.betas!r}")
        for beta in self.betas:
            require_number("betas", beta, least=0, below=1)
        self._require(require_number, "grad_clip", optional=True, above=0)
        self._require(require_number, "ema_decay", optional=True, least=0, below=1)
        if self.warmup_steps > self.steps:
            raise ArgumentError(f"warmup_steps: {self.warmup_steps} is more than the {self.steps} steps of the run")
        if self.batch_size % self.accumulate:
            raise ArgumentError(
                f"accumulate: batch_size {self.batch_size} cannot be cut into {self.accumulate} equal parts"
            )
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise ArgumentError(
                    f"device: expected a name such as 'cpu' or 'cuda:0', got {self.device!r}"
                ) from error


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of the step that follows ``step`` finished ones: a linear warm-up, then half a cosine.

    Args:
        step: from 0.
        config: ``learning_rate``, ``warmup_steps``, ``steps`` and ``final_lr_fraction`` count.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)
