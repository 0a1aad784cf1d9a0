"""Autoencoders with one or several levels of discrete codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

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
from fastvq._config import Config
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


# Random codes far from the data are never chosen and stay where they are: docs/codebooks.md compares.
_LIVE: dict[str, Any] = {"codebook_init": "kmeans", "revive_below": 1.0}
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
        reconstruction: [B, C, H, W], not clamped.
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
    def __init__(self, channels: int, hidden: int, *, legacy_skip: bool = False) -> None:
        super().__init__()
        self.legacy_skip = legacy_skip
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(x)
        return (activated if self.legacy_skip else x) + self.conv2(F.relu(self.conv1(activated)))


def _residual_blocks(config: VQVAEConfig) -> list[nn.Module]:
    return [
        ResidualBlock(config.channels, config.residual_channels, legacy_skip=config.legacy_skip)
        for _ in range(config.residual_layers)
    ]


def _encoder(in_channels: int, stride: int, config: VQVAEConfig) -> nn.Sequential:
    """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
    width = config.channels
    steps = int(math.log2(stride))
    widths = [in_channels, width // 2, *[width] * (steps - 1)]
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
    layers.append(nn.Conv2d(widths[-1], width, 3, padding=1))
    layers += _residual_blocks(config)
    return nn.Sequential(*layers, nn.ReLU())


def _decoder(in_channels: int, out_channels: int, stride: int, config: VQVAEConfig) -> nn.Sequential:
    """[B, in_channels, h, w] to [B, out_channels, h * stride, w * stride]."""
    width = config.channels
    steps = int(math.log2(stride))
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
    layers += _residual_blocks(config)
    layers.append(nn.ReLU())
    widths = [*[width] * (steps - 1), width // 2 if steps > 1 else width, out_channels]
    for index, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] if index else []
        layers.append(nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
    return nn.Sequential(*layers)


class HierarchicalVQVAE(PretrainedModel):
    """An encoder per level, quantised from the top down, and one decoder fed by all levels.

    The features of each level condition on everything above: level codes come from the level's encoder features
    concatenated with the decoded codes of the levels above (Razavi et al. 2019, section 3.1, figure 2).
    """

    config_class: ClassVar[type[VQVAEConfig]] = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = config = self.config_class.of(config, fields)
        dim, levels = config.code_dim, len(config.strides)
        sources = [config.in_channels, *[config.channels] * (levels - 1)]
        self.encoders = nn.ModuleList(  # finest level first, each feeding the next
            [_encoder(source, stride, config) for source, stride in zip(sources, config.strides, strict=True)]
        )
        # From here on level 0 is the top; level i sees the i levels above it.
        self.to_code = nn.ModuleList(
            [nn.Conv2d(config.channels + (dim if level else 0), dim, 1) for level in range(levels)]
        )
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
        self.upsamplers = nn.ModuleList([_upsampler(dim * (level + 1), step) for level, step in enumerate(steps)])
        self.decoder = _decoder(dim * levels, config.in_channels, config.strides[0], config)

    @classmethod
    def class_for(cls, config: VQVAEConfig) -> type[HierarchicalVQVAE]:
        if cls is not HierarchicalVQVAE:
            return cls
        return VQVAE if len(config.strides) == 1 else VQVAE2

    @property
    def num_levels(self) -> int:
        return len(self.config.strides)

    @property
    def total_stride(self) -> int:
        """Image height and width must be multiples of this."""
        return math.prod(self.config.strides)

    def code_shapes(self, image_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Grids of codes (h, w) of an image of size (H, W), top first."""
        height, width = image_size
        if height < 1 or width < 1 or height % self.total_stride or width % self.total_stride:
            raise ArgumentError(
                f"image_size: expected positive multiples of {self.total_stride}, got {height} x {width}"
            )
        scales = [math.prod(self.config.strides[: index + 1]) for index in range(self.num_levels)]
        return tuple((height // scale, width // scale) for scale in reversed(scales))

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Encode, quantise and decode images [B, C, H, W] in [-1, 1]; in training mode moves the codebooks."""
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
        """Codes of images [B, C, H, W] in [-1, 1]: int64 [B, h, w] for each level, top first."""
        if self.training:
            raise ArgumentError(
                "encode: the model is in training mode, in which a pass would move the codebooks; call eval()"
            )
        return tuple(out.codes for out in self._quantize(images)[1])

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images [B, C, H, W] in about [-1, 1] from the codes of all levels, top first, as from :meth:`encode`."""
        if isinstance(codes, Tensor) or len(codes) != self.num_levels:
            count = "a single tensor" if isinstance(codes, Tensor) else f"{len(codes)} levels"
            raise ArgumentError(f"codes: expected a sequence of {self.num_levels} levels, top first, got {count}")
        return self.preview(codes)

    def preview(self, codes: Sequence[Tensor], known: Sequence[Tensor] | None = None) -> Tensor:
        """What some codes alone say: :meth:`decode` with the mean vector of its level in place of each missing code.

        Args:
            codes: of one level or more, top first; the levels below are missing.
            known: bool [B, h, w] for each level of ``codes``: False where a code is missing, whatever its value.
        """
        if isinstance(codes, Tensor) or not 1 <= len(codes) <= self.num_levels:
            raise ArgumentError(f"codes: expected a sequence of 1 to {self.num_levels} levels, top first")
        if known is not None and len(known) != len(codes):
            raise ArgumentError(f"known: expected {len(codes)} masks, one for each level of codes, got {len(known)}")
        top = require_tensor("codes[0]", codes[0])
        require_shape("codes[0]", top, ["B", "h", "w"])
        if not top.shape[1] or not top.shape[2]:
            raise ArgumentError(f"codes[0]: expected at least one row and one column, got shape {list(top.shape)}")
        scale = self.total_stride
        shapes = self.code_shapes((top.shape[1] * scale, top.shape[2] * scale))
        context: Tensor | None = None
        for level, shape in enumerate(shapes):
            quantizer = self.quantizers[level]
            assert isinstance(quantizer, VectorQuantizer)
            grid = [top.shape[0], *shape]
            if level >= len(codes):
                vectors = _mean_vector(quantizer).expand(grid[0], -1, *shape)
            else:
                vectors = quantizer.lookup(require_codes(f"codes[{level}]", codes[level], grid, self.config.num_codes))
                if known is not None:
                    given = require_mask(f"known[{level}]", known[level], grid)
                    vectors = torch.where(given[:, None], vectors, _mean_vector(quantizer))
            context = self._extend(level, context, vectors)
        return self.decoder(context)

    def _quantize(self, images: Tensor) -> tuple[Tensor, list[QuantizerOutput]]:
        require_floating("images", require_tensor("images", images))
        require_shape("images", images, ["B", self.config.in_channels, "H", "W"])
        height, width = images.shape[2:]
        if height % self.total_stride or width % self.total_stride or not height or not width:
            raise ArgumentError(
                f"images: height and width must be positive multiples of {self.total_stride}, got {height} x {width}"
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


def _mean_vector(quantizer: VectorQuantizer) -> Tensor:
    """[1, D, 1, 1]: the codes' mean by their use. A code that is never used may lie anywhere, and has no say."""
    size = quantizer.cluster_size.float()
    weights = torch.where(size.sum() > 0, size / size.sum(), 1 / quantizer.num_codes)
    mean = (weights[:, None] * quantizer.embedding).sum(0).to(quantizer.embedding.dtype)
    return mean[None, :, None, None]


def _upsampler(channels: int, stride: int) -> nn.Module:
    steps = int(math.log2(stride))
    return nn.Sequential(*[nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1) for _ in range(steps)])


class VQVAE(HierarchicalVQVAE):
    """The single-level autoencoder (van den Oord et al. 2017); ``config.strides`` has one entry."""

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
    """The hierarchical autoencoder (Razavi et al. 2019); ``config.strides`` has two entries or more."""

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
