"""The interface that all priors share."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import (
    require_codes,
    require_floating,
    require_integer,
    require_number,
    require_odd,
    require_positive_int,
    require_range,
    require_shape,
    require_tensor,
    require_tuple,
)
from fastvq._config import Config
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.blocks import CodeConv2d, GatedBlock, centred_taps
from fastvq.models.code_tables import mixed_by_codebook
from fastvq.models.limits import LARGEST, LARGEST_KERNEL, MOST_LAYERS, MOST_LEVELS, MOST_POSITIONS
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


@dataclass(frozen=True, kw_only=True)
class PriorConfig(Config):
    """What every prior has in common.

    Args:
        shape: grid of codes (H, W).
        num_codes: size K of the codebook.
        num_classes: number of labels, or None for an unconditional prior.
        level: 0 for the top level, 1 for the next one down, ...; part of the key of the sampler's randomness.
        condition_shapes, condition_num_codes: grids and codebook sizes of the levels above that this prior is
            conditioned on, top first; empty for the top level. Each grid must divide the next, and ``shape``, evenly.
        condition_channels: width of the features that carry the condition and the label into every block.
        condition_blocks, condition_kernel: depth and kernel of the residual stack over the levels above.
        dropout: on the activations inside residual blocks.
    """

    shape: tuple[int, int]
    num_codes: int
    num_classes: int | None = None
    level: int = 0
    condition_shapes: tuple[tuple[int, int], ...] = ()
    condition_num_codes: tuple[int, ...] = ()
    condition_channels: int = 256
    condition_blocks: int = 3
    condition_kernel: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "num_codes", "condition_channels", maximum=LARGEST)
        self._require(require_positive_int, "level", minimum=0, maximum=LARGEST)
        self._require(require_positive_int, "condition_blocks", minimum=0, maximum=MOST_LAYERS)
        self._require(require_number, "dropout", least=0, below=1)
        self._require(require_odd, "condition_kernel", minimum=1, maximum=LARGEST_KERNEL)
        self._require(require_tuple, "shape", "condition_shapes", "condition_num_codes")
        self._require(require_positive_int, "num_classes", optional=True, maximum=LARGEST)
        if len(self.condition_shapes) != len(self.condition_num_codes):
            raise ArgumentError(
                f"condition_num_codes: expected one size per condition shape {self.condition_shapes}, "
                f"got {self.condition_num_codes}"
            )
        for count in self.condition_num_codes:
            require_positive_int("condition_num_codes", count, maximum=LARGEST)
        if len(self.condition_shapes) > MOST_LEVELS:
            raise ArgumentError(
                f"condition_shapes: expected at most {MOST_LEVELS} levels, got {len(self.condition_shapes)}"
            )
        grids = [*self.condition_shapes, self.shape]
        for grid in grids:
            name = "shape" if grid is self.shape else "condition_shapes"
            if not isinstance(grid, tuple) or len(grid) != 2:
                raise ArgumentError(f"{name}: expected (height, width), got {grid!r}")
            for side in grid:
                require_positive_int(name, side)
            if grid[0] * grid[1] > MOST_POSITIONS:
                raise ArgumentError(f"{name}: must have at most {MOST_POSITIONS} positions, got {grid}")
        for coarse, fine in itertools.pairwise(grids):
            if fine[0] % coarse[0] or fine[1] % coarse[1]:
                raise ArgumentError(f"condition_shapes: {coarse} does not divide {fine} evenly")

    @property
    def least_tensors(self) -> int:
        return self.condition_blocks if self.condition_shapes else 0

    def check_codebooks(self, codebooks: Sequence[Tensor]) -> None:
        """Whether codebooks can be those of this prior's codes.

        Args:
            codebooks: [K, D] of every level from the top down to this one.

        Raises:
            ArgumentError, ArgumentTypeError: another number of them or of codes, or values that are not finite
                floating-point numbers.
        """
        counts = [*self.condition_num_codes, self.num_codes]
        if len(codebooks) != len(counts):
            raise ArgumentError(
                f"codebooks: expected those of {self.level} level(s) above and of this one, got {len(codebooks)}"
            )
        for i, (codebook, count) in enumerate(zip(codebooks, counts, strict=True)):
            name = f"codebooks[{i}]"
            require_shape(name, require_tensor(name, codebook), [count, "D"])
            require_floating(name, codebook)
            if not codebook.isfinite().all():
                raise ArgumentError(f"{name}: has values that are not finite")


class ContextEncoder(nn.Module):
    """What a prior is told beforehand: residual features of the levels above, plus the label's vector.

    Each level's codes are looked up and joined, coarse to fine, by nearest-neighbour upsampling and addition; a stack
    of gated residual convolutions follows on the finest of these grids (Razavi et al. 2019, section 3.2).
    """

    def __init__(self, config: PriorConfig, *, legacy_skip: bool) -> None:
        super().__init__()
        width, kernel = config.condition_channels, config.condition_kernel
        self.shape = config.shape
        self.inputs = nn.ModuleList(
            [CodeConv2d(count, width, centred_taps(kernel)) for count in config.condition_num_codes]
        )
        blocks = config.condition_blocks if config.condition_shapes else 0
        self.blocks = nn.ModuleList(
            [
                GatedBlock(
                    width,
                    width,
                    conv=lambda i, o: nn.Conv2d(i, o, kernel, padding=kernel // 2),
                    dropout=config.dropout,
                    legacy_skip=legacy_skip,
                )
                for _ in range(blocks)
            ]
        )
        self.label = nn.Embedding(config.num_classes, width) if config.num_classes else None

    def forward(self, condition: Sequence[Tensor], label: Tensor | None) -> Tensor | None:
        """[B, condition_channels, H, W], or [B, condition_channels, 1, 1] of the label alone, or None."""
        features: Tensor | None = None
        for layer, codes in zip(self.inputs, condition, strict=True):
            coarse, features = features, layer(codes)
            if coarse is not None:
                features = features + F.interpolate(coarse, size=features.shape[2:], mode="nearest")
        if features is not None:
            for block in self.blocks:
                features = block(features)
            features = F.interpolate(features, size=self.shape, mode="nearest")
        if self.label is not None and label is not None:
            vector = self.label(label)[:, :, None, None]
            features = vector if features is None else features + vector
        return features


class Prior(PretrainedModel):
    """A distribution over grids of codes that factorises in raster order.

    ``prior(codes, condition, label)`` gives logits for every position at once; those at a position depend on earlier
    positions only, so the codes given there and later are of no consequence to it.

    Args:
        config: grid, codes, classes and levels above.
        legacy_skip: of the blocks over the levels above; see :class:`fastvq.models.PixelSNAILConfig`.
    """

    config_class: ClassVar[type[PriorConfig]] = PriorConfig
    config: PriorConfig

    def __init__(self, config: PriorConfig, *, legacy_skip: bool = False) -> None:
        super().__init__()
        self.config = config
        has_context = bool(config.condition_shapes) or config.num_classes is not None
        self.context_encoder = ContextEncoder(config, legacy_skip=legacy_skip) if has_context else None

    @property
    def context_channels(self) -> int:
        """Width of the features of condition and label; 0 without either."""
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
        """Features of condition and label, the same for all positions to come.

        Args:
            condition, label: as of :meth:`forward`.
            batch: number of samples.

        Returns:
            [B, C, H, W], or [B, C, 1, 1] of a label alone, or None without either.
        """
        conditions = self.check_condition(condition, batch)
        label = self.check_label(label, batch)
        return None if self.context_encoder is None else self.context_encoder(conditions, label)

    def statics(self, condition: Condition, label: Tensor | None, *, batch: int) -> dict[str, Tensor]:
        """What is known before the first position, by the names that plans of the prior use: float32 [B or 1, C, H, W].

        Args:
            condition, label: as of :meth:`forward`.
            batch: number of samples.

        Features of condition and label are ``context``, or ``label`` [B, C, 1, 1] where there is a label alone. Of the
        prior's modules only the context encoder may run here.
        """
        context = self.context(condition, label, batch=batch)
        if context is None:
            return {}
        return {"context" if self.config.condition_shapes else "label": context.float()}

    def check_condition(self, condition: Condition, batch: int) -> tuple[Tensor, ...]:
        """The levels above, ``condition`` of :meth:`forward`, as a checked tuple of int64 tensors [batch, h, w].

        Raises:
            ArgumentError, ArgumentTypeError: another number of levels, or shapes, dtypes or (on the CPU) values that do
                not fit ``config``.
        """
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
        """The ``label`` of :meth:`forward` as a checked int64 tensor [batch]; None for an unconditional prior.

        Raises:
            ArgumentError, ArgumentTypeError: labels that are missing, not asked for, or do not fit ``config``.
        """
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
        """Checked codes int64 [B, H', W] of the first H' rows of the grid.

        Raises:
            ArgumentError, ArgumentTypeError: shapes, dtypes or (on the CPU) values that do not fit ``config``.
        """
        height, width = self.config.shape
        codes = require_codes("codes", codes, ["B", "H'", width], self.config.num_codes)
        if not 1 <= codes.shape[1] <= height:
            raise ArgumentError(f"codes: expected 1 to {height} rows, got {codes.shape[1]}")
        return codes

    def nll(self, codes: Tensor, condition: Condition = None, label: Tensor | None = None) -> Tensor:
        """Negative log-likelihood in nats of every code, float32 [B, H', W].

        Args:
            codes: int [B, H', W].
            condition, label: as of :meth:`forward`.
        """
        codes = require_integer("codes", codes)
        return F.cross_entropy(self(codes, condition, label).float(), codes, reduction="none")

    @torch.no_grad()
    def start_from_codebooks(self, codebooks: Sequence[Tensor]) -> None:
        """Let a new prior treat similar codes alike: changes the weights that belong to codes, which should be random.

        Codes are numbers without an order, so a prior with random weights has to find out from data which of them mean
        nearly the same; the codebook knows. The weights of the layers over codes (:class:`CodeConv2d`, over those of
        this level and of the levels above) and of the last layer, ``output``, are mixed over the codes until those of
        two codes are as similar as the codes' vectors; they keep their variance. Training may change them in any way.

        Args:
            codebooks: [K, D] of every level from the top down to this one, each with its own D.

        Raises:
            ArgumentError, ArgumentTypeError: as of :meth:`PriorConfig.check_codebooks`.
        """
        self.config.check_codebooks(codebooks)
        above = () if self.context_encoder is None else self.context_encoder.inputs
        of_layer = dict(zip(above, codebooks, strict=False))
        layers = [layer for layer in self.modules() if isinstance(layer, CodeConv2d)]
        tables = [(layer.weight, 1, of_layer.get(layer, codebooks[-1])) for layer in layers]
        output = getattr(getattr(self, "output", None), "weight", None)
        if isinstance(output, nn.Parameter) and output.shape[0] == self.config.num_codes:
            tables.append((output, 0, codebooks[-1]))
        for weight, dim, codebook in tables:
            weight.copy_(mixed_by_codebook(weight, codebook, dim))

    @abstractmethod
    def logits(self, codes: Tensor, context: Tensor | None) -> Tensor:
        """:meth:`forward` with the result of :meth:`context`, for callers that need it more than once.

        Args:
            codes: int [B, H', W].
            context: what :meth:`context` gave.

        Returns:
            [B, K, H', W].
        """
