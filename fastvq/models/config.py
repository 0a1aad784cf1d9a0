"""Frozen configurations of the models, stored as JSON beside the weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from fastvq._check import (
    require_bool,
    require_choice,
    require_number,
    require_odd,
    require_positive_int,
    require_tuple,
)
from fastvq._config import Config
from fastvq.errors import ArgumentError
from fastvq.ops.grid import FORMS, MASKS, Form, Mask

CodebookInit = Literal["normal", "data", "kmeans"]
Activation = Literal["elu", "concat_elu"]
ACTIVATIONS = ("elu", "concat_elu")
CODEBOOK_INITS = ("normal", "data", "kmeans")

# Far beyond any use; what lies above them is a mistake, or a damaged file, that would cost hours or all memory.
LARGEST = 2**24
LARGEST_KERNEL = 255
MOST_LAYERS = 10_000
MOST_LEVELS = 16
MOST_POSITIONS = 2**22


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(Config):
    """An autoencoder with one code map per entry of ``strides``.

    Args:
        in_channels: image channels.
        channels, residual_channels, residual_layers: width of the convolutions, inner width and number of residual
            blocks of each encoder and decoder.
        num_codes, code_dim: size of every codebook.
        strides: how much each level shrinks the one below it, finest level first: (4, 2) turns a 256 x 256 image into
            64 x 64 bottom and 32 x 32 top codes. Powers of two from 2.
        commitment: weight beta of the commitment loss.
        decay: decay of the codebook's exponential moving average.
        codebook_init: ``normal`` (random), ``data`` (vectors of the first batch) or ``kmeans`` (clusters of it).
        revive_below: codes whose average use per batch falls below this are moved onto vectors of the batch; 0: never.
        legacy_skip: residual blocks add relu(x) instead of x, as in models trained elsewhere with a ReLU that overwrote
            the block's input. For those only; see :mod:`fastvq.interop`.
    """

    in_channels: int = 3
    channels: int = 128
    residual_channels: int = 64
    residual_layers: int = 2
    num_codes: int = 512
    code_dim: int = 64
    strides: tuple[int, ...] = (4, 2)
    commitment: float = 0.25
    decay: float = 0.99
    codebook_init: CodebookInit = "normal"
    revive_below: float = 0.0
    legacy_skip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            require_positive_int,
            "in_channels",
            "channels",
            "residual_channels",
            "num_codes",
            "code_dim",
            maximum=LARGEST,
        )
        self._require(require_positive_int, "residual_layers", minimum=0, maximum=MOST_LAYERS)
        self._require(require_number, "decay", least=0, below=1)
        self._require(require_number, "commitment", "revive_below", least=0)
        self._require(require_choice, "codebook_init", choices=CODEBOOK_INITS)
        self._require(require_bool, "legacy_skip")
        self._require(require_tuple, "strides")
        if not self.strides or any(not isinstance(s, int) or s < 2 or s & (s - 1) for s in self.strides):
            raise ArgumentError(f"strides: expected powers of two from 2, finest level first, got {self.strides!r}")
        if len(self.strides) > MOST_LEVELS or max(self.strides) > LARGEST:
            raise ArgumentError(f"strides: expected at most {MOST_LEVELS}, none above {LARGEST}, got {self.strides!r}")
        if self.channels % 2:
            raise ArgumentError(f"channels: must be even, got {self.channels}")

    @property
    def least_tensors(self) -> int:
        return len(self.strides) * self.residual_layers


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


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig(PriorConfig):
    """Residual gated causal convolutions with interspersed causal attention (Chen et al. 2017; Razavi et al. 2019).

    Args:
        channels, residual_channels: width of the trunk and inner width of the gated blocks.
        kernel_size, form: causal kernel, see :func:`fastvq.ops.causal_conv2d`.
        mask: ``strict`` convolutions leave the current position out in every layer, ``inclusive`` ones only in the
            first. Attention follows the same mask.
        blocks, layers_per_block: each block is that many gated layers, then attention (or a 1 x 1 convolution).
        attention, attention_heads, attention_channels, attention_dropout: whether blocks end in attention; its number
            of heads, total width of keys and values (None: half of ``channels``) and dropout on its logits.
        output_blocks: 1 x 1 gated blocks before the logits.
        activation: ``elu`` or ``concat_elu``.
        legacy_skip: gated blocks add elu(x) instead of x, those of the conditioning stack and the output included, and
            attention keys read elu of their block's input if gated layers precede them. So compute models trained
            elsewhere with an ELU that overwrote what it was given: whatever read a tensor after the first gated block
            that took it found it activated. Concatenated inputs were copies, so that the block over keys activated
            once more without touching features and queries. For such models only; see :mod:`fastvq.interop`.
    """

    channels: int = 256
    residual_channels: int = 256
    kernel_size: int = 5
    form: Form = "rows"
    mask: Mask = "strict"
    blocks: int = 4
    layers_per_block: int = 4
    attention: bool = True
    attention_heads: int = 8
    attention_channels: int | None = None
    attention_dropout: float = 0.0
    output_blocks: int = 0
    activation: Activation = "elu"
    legacy_skip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "channels", "residual_channels", "attention_heads", maximum=LARGEST)
        self._require(require_positive_int, "blocks", maximum=MOST_LAYERS)
        self._require(require_positive_int, "layers_per_block", "output_blocks", minimum=0, maximum=MOST_LAYERS)
        self._require(require_positive_int, "kernel_size", minimum=2, maximum=LARGEST_KERNEL)
        self._require(require_choice, "form", choices=FORMS)
        self._require(require_choice, "mask", choices=MASKS)
        self._require(require_choice, "activation", choices=ACTIVATIONS)
        self._require(require_number, "attention_dropout", least=0, below=1)
        self._require(require_bool, "attention")
        self._require(require_bool, "legacy_skip")
        if self.legacy_skip and self.activation != "elu":
            raise ArgumentError(f"legacy_skip: expected activation 'elu' with it, got {self.activation!r}")
        self._require(require_positive_int, "attention_channels", optional=True, maximum=LARGEST)
        if self.attention and (self.attention_width < 1 or self.attention_width % self.attention_heads):
            raise ArgumentError(
                f"attention_channels: {self.attention_width} is not a multiple of {self.attention_heads} heads"
            )

    @property
    def least_tensors(self) -> int:
        return super().least_tensors + self.blocks * (self.layers_per_block + 1) + self.output_blocks

    @property
    def attention_width(self) -> int:
        """Total width of keys and values over all heads."""
        return self.channels // 2 if self.attention_channels is None else self.attention_channels


@dataclass(frozen=True, kw_only=True)
class GatedPixelCNNConfig(PriorConfig):
    """Gated PixelCNN with a vertical and a horizontal stack (van den Oord et al. 2016).

    Args:
        channels: width of both stacks.
        layers: gated layers after the first.
        kernel_size: odd; the vertical stack reads k // 2 + 1 rows of k columns.
        output_channels: width of the 1 x 1 layer before the logits.
    """

    channels: int = 64
    layers: int = 15
    kernel_size: int = 3
    output_channels: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "channels", "output_channels", maximum=LARGEST)
        self._require(require_positive_int, "layers", minimum=0, maximum=MOST_LAYERS)
        self._require(require_odd, "kernel_size", minimum=3, maximum=LARGEST_KERNEL)

    @property
    def least_tensors(self) -> int:
        return super().least_tensors + self.layers
