"""Settings of a training run, and the learning rate they imply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from fastvq._check import require_choice, require_positive_int
from fastvq.data.base import require_seed
from fastvq.errors import ArgumentError, ArgumentTypeError

# A run may go on with other values of these: they change neither the weights nor the values in the log.
NEUTRAL_FIELDS = frozenset(
    {"log_every", "image_every", "checkpoint_every", "keep_checkpoints", "num_workers", "device"}
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
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
        accumulate: equal parts a batch is cut into, one forward and backward pass each, to save memory. The step is
            that of the whole batch up to rounding (and up to dropout, whose mask is drawn part by part).
        seed: of the initial weights, dropout, the order of the data, the augmentation and the validation split.
        validation_fraction: share of the images held out in stage 1; 0: no validation.
        log_every: steps between two lines of training metrics, each the mean over these steps.
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
    accumulate: int = 1
    seed: int = 0
    validation_fraction: float = 0.1
    log_every: int = 50
    image_every: int | None = 1000
    checkpoint_every: int | None = 1000
    keep_checkpoints: int = 2
    num_workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep_checkpoints"):
            require_positive_int(name, getattr(self, name))
        for name in ("image_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        require_positive_int("warmup_steps", self.warmup_steps, minimum=0)
        require_positive_int("num_workers", self.num_workers, minimum=0)
        require_seed("seed", self.seed)
        require_choice("optimizer", self.optimizer, ("adamw", "adam"))
        for name in ("bf16", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ArgumentTypeError(f"betas: expected a pair of numbers, got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        self._require_number("learning_rate", self.learning_rate, above=0.0)
        self._require_number("weight_decay", self.weight_decay, least=0.0)
        self._require_number("final_lr_fraction", self.final_lr_fraction, least=0.0, most=1.0)
        self._require_number("validation_fraction", self.validation_fraction, least=0.0, below=1.0)
        for beta in self.betas:
            self._require_number("betas", beta, least=0.0, below=1.0)
        if self.grad_clip is not None:
            self._require_number("grad_clip", self.grad_clip, above=0.0)
        if self.ema_decay is not None:
            self._require_number("ema_decay", self.ema_decay, least=0.0, below=1.0)
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

    def _require_number(
        self,
        name: str,
        value: object,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
        below: float = math.inf,
    ) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"{name}: expected a number, got {value!r}")
        if not (math.isfinite(value) and least <= value <= most and above < value < below):
            bounds = [
                text
                for bound, text in (
                    (least, f"at least {least}"),
                    (above, f"above {above}"),
                    (most, f"at most {most}"),
                    (below, f"below {below}"),
                )
                if math.isfinite(bound)
            ]
            raise ArgumentError(f"{name}: must be finite, {' and '.join(bounds)}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings stored by :meth:`to_dict`; unknown or missing fields are an error."""
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {field.name for field in fields})
        missing = sorted({f.name for f in fields if f.default is dataclasses.MISSING} - set(values))
        if unknown or missing:
            raise ArgumentError(f"{cls.__name__}: unknown fields {unknown}, missing fields {missing}")
        return cls(**values)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of the step that follows ``step`` finished ones: a linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)
