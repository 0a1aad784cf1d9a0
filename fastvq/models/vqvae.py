"""Autoencoders with one or several levels of discrete codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import (
    require_bool,
    require_choice,
    require_codes,
    require_floating,
    require_mask,
    require_number,
    require_positive_int,
    require_shape,
    require_tensor,
    require_tuple,
)
from fastvq._config import ADDED, Config
from fastvq.errors import ArgumentError
from fastvq.models.limits import LARGEST, MOST_LAYERS, MOST_LEVELS
from fastvq.models.pretrained import PretrainedModel
from fastvq.models.quantizer import CODEBOOK_INITS, CodebookInit, QuantizerOutput, VectorQuantizer


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
        spatial_dims: axes that are convolved: 1 for signals [B, C, L], 2 for images, 3 for volumes [B, C, D, H, W].
            Pipelines, priors and the training of this package are for images.
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
    spatial_dims: int = field(default=2, metadata=ADDED)

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
        self._require(require_positive_int, "spatial_dims", maximum=3)
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


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_AXES = {1: "L", 2: "HW", 3: "DHW"}
_SIDES = {1: "length", 2: "height and width", 3: "depth, height and width"}

# Random codes far from the data would never be chosen and stay where they are: docs/codebooks.md compares.
_LIVE: dict[str, Any] = {"revive_below": 1.0}
_TINY: dict[str, Any] = {
    "in_channels": 1,
    "channels": 16,
    "residual_channels": 8,
    "residual_layers": 1,
    "num_codes": 16,
    "code_dim": 8,
    "codebook_init": "data",
}


class VQVAEOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        reconstruction: [B, C, H, W] as the images, not clamped.
        codes: int64 [B, h, w] for each level, top first.
        commitment_loss: scalar, weighted by beta and added over levels.
        perplexity: [levels], top first.
        dead_codes: int64 [levels], how many codes no vector of this batch has.
    """

    reconstruction: Tensor
    codes: tuple[Tensor, ...]
    commitment_loss: Tensor
    perplexity: Tensor
    dead_codes: Tensor


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, hidden: int, *, legacy_skip: bool = False, spatial_dims: int = 2) -> None:
        super().__init__()
        self.legacy_skip = legacy_skip
        conv = _CONVOLUTIONS[spatial_dims]
        self.conv1 = conv(channels, hidden, 3, padding=1)
        self.conv2 = conv(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(x)
        return (activated if self.legacy_skip else x) + self.conv2(F.relu(self.conv1(activated)))


def _residual_blocks(config: VQVAEConfig) -> list[nn.Module]:
    return [
        ResidualBlock(
            config.channels,
            config.residual_channels,
            legacy_skip=config.legacy_skip,
            spatial_dims=config.spatial_dims,
        )
        for _ in range(config.residual_layers)
    ]


def _encoder(in_channels: int, stride: int, config: VQVAEConfig) -> nn.Sequential:
    """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
    conv, width = _CONVOLUTIONS[config.spatial_dims], config.channels
    steps = int(math.log2(stride))
    widths = [in_channels, width // 2, *[width] * (steps - 1)]
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [conv(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
    layers.append(conv(widths[-1], width, 3, padding=1))
    layers += _residual_blocks(config)
    return nn.Sequential(*layers, nn.ReLU())


def _decoder(in_channels: int, out_channels: int, stride: int, config: VQVAEConfig) -> nn.Sequential:
    """[B, in_channels, h, w] to [B, out_channels, h * stride, w * stride]."""
    width = config.channels
    steps = int(math.log2(stride))
    layers: list[nn.Module] = [_CONVOLUTIONS[config.spatial_dims](in_channels, width, 3, padding=1)]
    layers += _residual_blocks(config)
    layers.append(nn.ReLU())
    widths = [*[width] * (steps - 1), width // 2 if steps > 1 else width, out_channels]
    for index, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] if index else []
        layers.append(_TRANSPOSED[config.spatial_dims](wide, narrow, 4, stride=2, padding=1))
    return nn.Sequential(*layers)


class HierarchicalVQVAE(PretrainedModel):
    """An encoder per level, quantised from the top down, and one decoder fed by all levels.

    The features of each level condition on everything above: level codes come from the level's encoder features
    concatenated with the decoded codes of the levels above (Razavi et al. 2019, section 3.1, figure 2).

    Shapes below are those of images; with ``config.spatial_dims`` of 1 or 3 images [B, C, L] or [B, C, D, H, W] have
    codes [B, l] or [B, d, h, w].

    Args:
        config, fields: a configuration, or its fields as keywords, alone or to replace some.
    """

    config_class: ClassVar[type[VQVAEConfig]] = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = config = self.config_class.of(config, fields)
        dim, levels = config.code_dim, len(config.strides)
        conv = _CONVOLUTIONS[config.spatial_dims]
        sources = [config.in_channels, *[config.channels] * (levels - 1)]
        self.encoders = nn.ModuleList(  # finest level first, each feeding the next
            [_encoder(source, stride, config) for source, stride in zip(sources, config.strides, strict=True)]
        )
        # From here on level 0 is the top; level i sees the i levels above it.
        self.to_code = nn.ModuleList([conv(config.channels + (dim if level else 0), dim, 1) for level in range(levels)])
        self.quantizers = nn.ModuleList(
            [
                VectorQuantizer(
                    config.num_codes,
                    dim,
                    decay=config.decay,
                    commitment=config.commitment,
                    init=config.codebook_init,
                    revive_below=config.revive_below,
                )
                for _ in range(levels)
            ]
        )
        steps = config.strides[:0:-1]  # from level i to the finer level i + 1
        self.conditioners = nn.ModuleList(
            [_decoder(dim * (level + 1), dim, step, config) for level, step in enumerate(steps)]
        )
        self.upsamplers = nn.ModuleList(
            [_upsampler(dim * (level + 1), step, config.spatial_dims) for level, step in enumerate(steps)]
        )
        self.decoder = _decoder(dim * levels, config.in_channels, config.strides[0], config)

    @classmethod
    def class_for(cls, config: VQVAEConfig) -> type[HierarchicalVQVAE]:
        if cls is not HierarchicalVQVAE:
            return cls
        return VQVAE if len(config.strides) == 1 else VQVAE2

    @property
    def num_levels(self) -> int:
        """Number of grids of codes."""
        return len(self.config.strides)

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """The codes' vectors of each level, [K, D], top first: those of the quantisers, not copies."""
        return tuple(cast(VectorQuantizer, quantizer).embedding.detach() for quantizer in self.quantizers)

    @property
    def total_stride(self) -> int:
        """An image's sides must be multiples of this."""
        return math.prod(self.config.strides)

    def code_shapes(self, image_size: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Grids of codes (h, w) of an image of size (H, W), top first.

        Args:
            image_size: (H, W) in pixels, multiples of ``total_stride``.

        Raises:
            ArgumentError: another number of sides, or no such multiples.
        """
        if len(image_size) != self.config.spatial_dims:
            raise ArgumentError(
                f"image_size: expected {_SIDES[self.config.spatial_dims]} (spatial_dims="
                f"{self.config.spatial_dims}), got {tuple(image_size)}"
            )
        if not self._divides(image_size):
            raise ArgumentError(
                f"image_size: expected positive multiples of {self.total_stride}, got {_by(image_size)}"
            )
        scales = [math.prod(self.config.strides[: index + 1]) for index in range(self.num_levels)]
        return tuple(tuple(side // scale for side in image_size) for scale in reversed(scales))

    def _divides(self, image_size: Sequence[int]) -> bool:
        return all(side >= 1 and side % self.total_stride == 0 for side in image_size)

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Encode, quantise and decode images [B, C, H, W] in [-1, 1]; in training mode moves the codebooks.

        Raises:
            ArgumentError, ArgumentTypeError: not images, of other channels, or of sides that ``total_stride`` does not
                divide.
        """
        context, outputs = self._quantize(images)
        return VQVAEOutput(
            self.decoder(context),
            tuple(out.codes for out in outputs),
            torch.stack([out.commitment_loss for out in outputs]).sum(),
            torch.stack([out.perplexity for out in outputs]),
            torch.stack([out.dead_codes for out in outputs]),
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Codes of images [B, C, H, W] in [-1, 1]: int64 [B, h, w] for each level, top first.

        Raises:
            ArgumentError, ArgumentTypeError: images that do not fit, or the model is in training mode.
        """
        if self.training:
            raise ArgumentError(
                "encode: the model is in training mode, in which a pass would move the codebooks; call eval()"
            )
        return tuple(out.codes for out in self._quantize(images)[1])

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images [B, C, H, W] in about [-1, 1] from the codes of all levels, top first, as from :meth:`encode`.

        Raises:
            ArgumentError, ArgumentTypeError: another number of levels, or shapes, dtypes or (on the CPU) values that do
                not fit.
        """
        if isinstance(codes, Tensor) or len(codes) != self.num_levels:
            count = "a single tensor" if isinstance(codes, Tensor) else f"{len(codes)} levels"
            raise ArgumentError(f"codes: expected a sequence of {self.num_levels} levels, top first, got {count}")
        return self.preview(codes)

    def preview(self, codes: Sequence[Tensor], known: Sequence[Tensor] | None = None) -> Tensor:
        """What some codes alone say: :meth:`decode` with the mean vector of its level in place of each missing code.

        Args:
            codes: of one level or more, top first; the levels below are missing.
            known: bool [B, h, w] for each level of ``codes``: False where a code is missing, whatever its value.

        Raises:
            ArgumentError, ArgumentTypeError: as of :meth:`decode`, or masks that do not fit the codes.
        """
        if isinstance(codes, Tensor) or not 1 <= len(codes) <= self.num_levels:
            raise ArgumentError(f"codes: expected a sequence of 1 to {self.num_levels} levels, top first")
        if known is not None and len(known) != len(codes):
            raise ArgumentError(f"known: expected {len(codes)} masks, one for each level of codes, got {len(known)}")
        top = require_tensor("codes[0]", codes[0])
        require_shape("codes[0]", top, ["B", *_AXES[self.config.spatial_dims].lower()])
        if 0 in top.shape[1:]:
            raise ArgumentError(f"codes[0]: expected at least one code along each axis, got shape {list(top.shape)}")
        shapes = self.code_shapes(tuple(side * self.total_stride for side in top.shape[1:]))
        context: Tensor | None = None
        for level, shape in enumerate(shapes):
            quantizer = self.quantizers[level]
            assert isinstance(quantizer, VectorQuantizer)
            grid = [top.shape[0], *shape]
            if level >= len(codes):
                vectors = self._mean_vector(quantizer).expand(grid[0], -1, *shape)
            else:
                vectors = quantizer.lookup(require_codes(f"codes[{level}]", codes[level], grid, self.config.num_codes))
                if known is not None:
                    given = require_mask(f"known[{level}]", known[level], grid)
                    vectors = torch.where(given[:, None], vectors, self._mean_vector(quantizer))
            context = self._extend(level, context, vectors)
        return self.decoder(context)

    def _quantize(self, images: Tensor) -> tuple[Tensor, list[QuantizerOutput]]:
        require_floating("images", require_tensor("images", images))
        dims = self.config.spatial_dims
        require_shape("images", images, ["B", self.config.in_channels, *_AXES[dims]])
        if not self._divides(images.shape[2:]):
            raise ArgumentError(
                f"images: {_SIDES[dims]} must be positive multiples of {self.total_stride}, got {_by(images.shape[2:])}"
            )
        features = []
        x = images
        for encoder in self.encoders:
            x = encoder(x)
            features.append(x)
        context: Tensor | None = None
        outputs: list[QuantizerOutput] = []
        for level, quantizer in enumerate(self.quantizers):
            x = features.pop()
            if context is not None:
                x = torch.cat([self.conditioners[level - 1](context), x], dim=1)
            outputs.append(quantizer(self.to_code[level](x)))
            context = self._extend(level, context, outputs[-1].quantized)
        assert context is not None
        return context, outputs

    def _extend(self, level: int, context: Tensor | None, vectors: Tensor) -> Tensor:
        """All levels down to this one at this level's size: [B, (level + 1) * code_dim, h, w]."""
        if context is None:
            return vectors
        return torch.cat([self.upsamplers[level - 1](context), vectors], dim=1)

    def _mean_vector(self, quantizer: VectorQuantizer) -> Tensor:
        """[1, D, 1, 1]: the codes' mean by their use. A code that is never used may lie anywhere, and has no say."""
        size = quantizer.cluster_size.float()
        weights = torch.where(size.sum() > 0, size / size.sum(), 1 / quantizer.num_codes)
        mean = (weights[:, None] * quantizer.embedding).sum(0).to(quantizer.embedding.dtype)
        return mean.view(1, -1, *[1] * self.config.spatial_dims)


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _upsampler(channels: int, stride: int, spatial_dims: int) -> nn.Module:
    conv, steps = _TRANSPOSED[spatial_dims], int(math.log2(stride))
    return nn.Sequential(*[conv(channels, channels, 4, stride=2, padding=1) for _ in range(steps)])


class VQVAE(HierarchicalVQVAE):
    """The single-level autoencoder (van den Oord et al. 2017).

    Args:
        config, fields: a configuration with one entry of ``strides``, or its fields as keywords, alone or to replace
            some.
    """

    presets: ClassVar[Mapping[str, VQVAEConfig]] = {
        # Section 4.1 there: 128 x 128 images in 32 x 32 codes, 256 hidden units.
        "imagenet128": VQVAEConfig(strides=(4,), channels=256, residual_channels=256, **_LIVE),
        "tiny-single": VQVAEConfig(strides=(4,), **_TINY),
    }

    def __init__(self, config: VQVAEConfig | None = None, **fields: Any) -> None:
        config = self.config_class.of(config, fields if config is not None else {"strides": (4,), **fields})
        if len(config.strides) != 1:
            raise ArgumentError(f"config.strides: VQVAE has one level, got {config.strides}; use VQVAE2")
        super().__init__(config)


class VQVAE2(HierarchicalVQVAE):
    """The hierarchical autoencoder (Razavi et al. 2019).

    Args:
        config, fields: a configuration with two entries of ``strides`` or more, or its fields as keywords, alone or to
            replace some.
    """

    presets: ClassVar[Mapping[str, VQVAEConfig]] = {
        # The first two follow the appendix there, except that their codebooks start from data and stay in use.
        "imagenet256": VQVAEConfig(strides=(4, 2), **_LIVE),
        "ffhq1024": VQVAEConfig(strides=(8, 2, 2), **_LIVE),
        # For one GPU, the first one for a patient CPU as well; the number is the side of the images.
        "photos64": VQVAEConfig(strides=(4, 2), **_LIVE),
        "photos128": VQVAEConfig(strides=(4, 2), **_LIVE),
        "photos256": VQVAEConfig(strides=(4, 2), **_LIVE),
        "emoji": VQVAEConfig(strides=(4, 2), channels=96, residual_channels=48, **_LIVE),
        "digits": VQVAEConfig(
            in_channels=1,
            channels=64,
            residual_channels=32,
            num_codes=128,
            code_dim=32,
            strides=(8, 2),
            **_LIVE,
        ),
        "tiny": VQVAEConfig(strides=(4, 2), **_TINY),
    }

    def __init__(self, config: VQVAEConfig | None = None, **fields: Any) -> None:
        config = self.config_class.of(config, fields)
        if len(config.strides) < 2:
            raise ArgumentError(f"config.strides: VQVAE2 has two levels or more, got {config.strides}; use VQVAE")
        super().__init__(config)
