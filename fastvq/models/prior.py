"""The interface that all priors share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_codes, require_integer, require_range, require_shape, require_tensor
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.blocks import ContextEncoder
from fastvq.models.config import PriorConfig
from fastvq.models.pretrained import PretrainedModel

Condition = Tensor | Sequence[Tensor] | None


def condition_levels(condition: Condition) -> tuple[Tensor, ...]:
    """The levels above as a tuple, whatever way they were given; not checked further."""
    if condition is None:
        return ()
    if isinstance(condition, Tensor):
        return (condition,)
    if not isinstance(condition, Sequence):
        kind = type(condition).__name__
        raise ArgumentTypeError(f"condition: expected a tensor, a sequence of tensors or None, got {kind}")
    return tuple(condition)


class Prior(PretrainedModel):
    """A distribution over grids of codes that factorises in raster order.

    ``prior(codes, condition, label)`` gives logits for every position at once; those at a position depend on earlier
    positions only, so the codes given there and later are of no consequence to it.
    """

    config_class: ClassVar[type[PriorConfig]] = PriorConfig
    config: PriorConfig

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        has_context = bool(config.condition_shapes) or config.num_classes is not None
        self.context_encoder = ContextEncoder(config) if has_context else None

    @property
    def context_channels(self) -> int:
        return self.config.condition_channels if self.context_encoder is not None else 0

    def forward(self, codes: Tensor, condition: Condition = None, label: Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            codes: int [B, H', W]; H' <= H rows from the top of the grid.
            condition: codes of the levels above, int [B, h, w], a sequence of them (top first) if there are several.
            label: int [B] in 0..num_classes-1.

        Returns:
            [B, K, H', W].

        Raises:
            ArgumentError, ArgumentTypeError: shapes, dtypes or (on the CPU) values that do not fit ``config``.
        """
        require_shape("codes", require_tensor("codes", codes), ["B", "H'", "W"])
        return self.logits(codes, self.context(condition, label, batch=codes.shape[0]))

    def context(self, condition: Condition, label: Tensor | None, *, batch: int) -> Tensor | None:
        """Features of condition and label, the same for all positions to come: [B, C, H, W], [B, C, 1, 1] or None."""
        conditions = self.check_condition(condition, batch)
        label = self.check_label(label, batch)
        return None if self.context_encoder is None else self.context_encoder(conditions, label)

    def statics(self, condition: Condition, label: Tensor | None, *, batch: int) -> dict[str, Tensor]:
        """What is known before the first position, by the names that plans of the prior use: float32 [B or 1, C, H, W].

        Features of condition and label are ``context``, or ``label`` [B, C, 1, 1] where there is a label alone. Of the
        prior's modules only the context encoder may run here.
        """
        context = self.context(condition, label, batch=batch)
        if context is None:
            return {}
        return {"context" if self.config.condition_shapes else "label": context.float()}

    def check_condition(self, condition: Condition, batch: int) -> tuple[Tensor, ...]:
        """The levels above as a checked tuple of int64 tensors."""
        shapes = self.config.condition_shapes
        given = condition_levels(condition)
        if len(given) != len(shapes):
            wanted = f"codes of {len(shapes)} level(s) above of shapes {shapes}" if shapes else "None"
            raise ArgumentError(f"condition: this prior expects {wanted}, got {len(given)} tensor(s)")
        return tuple(
            require_codes(f"condition[{i}]", codes, [batch, *shape], count)
            for i, (codes, shape, count) in enumerate(zip(given, shapes, self.config.condition_num_codes, strict=True))
        )

    def check_label(self, label: Tensor | None, batch: int) -> Tensor | None:
        classes = self.config.num_classes
        if classes is None:
            if label is not None:
                raise ArgumentError("label: this prior is not class-conditional (num_classes is None), got labels")
            return None
        if label is None:
            raise ArgumentError(f"label: this prior is class-conditional, expected int [{batch}] in 0..{classes - 1}")
        label = require_integer("label", label)
        require_shape("label", label, [batch])
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            require_range("label", label, classes)
        return label

    def check_codes(self, codes: Tensor) -> Tensor:
        height, width = self.config.shape
        codes = require_codes("codes", codes, ["B", "H'", width], self.config.num_codes)
        if not 1 <= codes.shape[1] <= height:
            raise ArgumentError(f"codes: expected 1 to {height} rows, got {codes.shape[1]}")
        return codes

    def nll(self, codes: Tensor, condition: Condition = None, label: Tensor | None = None) -> Tensor:
        """Negative log-likelihood in nats of every code, [B, H', W]."""
        codes = require_integer("codes", codes)
        return F.cross_entropy(self(codes, condition, label).float(), codes, reduction="none")

    @abstractmethod
    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        """:meth:`forward` with the result of :meth:`context`, for callers that need it more than once."""
