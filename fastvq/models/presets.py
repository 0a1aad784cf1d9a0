"""Named configurations: the papers' tables and small ones for two-core machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastvq._config import Config
from fastvq.errors import ArgumentError
from fastvq.models.config import GatedPixelCNNConfig, PixelSNAILConfig, VQVAEConfig
from fastvq.models.pixelcnn import GatedPixelCNN
from fastvq.models.pixelsnail import PixelSNAIL
from fastvq.models.pretrained import PretrainedModel
from fastvq.models.vqvae import VQVAE, VQVAE2

# The hierarchical autoencoders and priors follow the appendix of Razavi et al. 2019. There the top prior's 20 layers
# have attention after every 5, which is 4 blocks of 5; FFHQ's middle prior has attention once, after all 20.
_DIGITS_CONDITION: dict[str, Any] = {"condition_shapes": ((2, 2),), "condition_num_codes": (128,)}
_TINY: dict[str, Any] = {
    "num_codes": 16,
    "channels": 16,
    "dropout": 0.0,
    "condition_channels": 16,
    "condition_blocks": 1,
}
_TINY_SNAIL: dict[str, Any] = {
    **_TINY,
    "residual_channels": 16,
    "kernel_size": 3,
    "blocks": 1,
    "layers_per_block": 1,
    "attention_heads": 2,
}

PRESETS: dict[str, tuple[type[PretrainedModel], Config]] = {
    "imagenet256": (VQVAE2, VQVAEConfig(strides=(4, 2))),
    "imagenet256-top": (
        PixelSNAIL,
        PixelSNAILConfig(
            shape=(32, 32),
            num_codes=512,
            num_classes=1000,
            channels=512,
            residual_channels=2048,
            layers_per_block=5,
            condition_channels=512,
            output_blocks=20,
            dropout=0.1,
            attention_dropout=0.1,
        ),
    ),
    "imagenet256-bottom": (
        PixelSNAIL,
        PixelSNAILConfig(
            shape=(64, 64),
            num_codes=512,
            num_classes=1000,
            level=1,
            channels=512,
            residual_channels=1024,
            layers_per_block=5,
            attention=False,
            condition_shapes=((32, 32),),
            condition_num_codes=(512,),
            condition_channels=512,
            condition_blocks=20,
            dropout=0.1,
        ),
    ),
    "ffhq1024": (VQVAE2, VQVAEConfig(strides=(8, 2, 2))),
    "ffhq1024-top": (
        PixelSNAIL,
        PixelSNAILConfig(
            shape=(32, 32),
            num_codes=512,
            channels=512,
            residual_channels=2048,
            layers_per_block=5,
            dropout=0.5,
            attention_dropout=0.5,
        ),
    ),
    "ffhq1024-mid": (
        PixelSNAIL,
        PixelSNAILConfig(
            shape=(64, 64),
            num_codes=512,
            level=1,
            channels=512,
            residual_channels=1024,
            blocks=1,
            layers_per_block=20,
            condition_shapes=((32, 32),),
            condition_num_codes=(512,),
            condition_channels=512,
            condition_blocks=8,
            dropout=0.3,
            attention_dropout=0.3,
        ),
    ),
    "ffhq1024-bottom": (
        PixelSNAIL,
        PixelSNAILConfig(
            shape=(128, 128),
            num_codes=512,
            level=2,
            channels=512,
            residual_channels=1024,
            blocks=1,
            layers_per_block=10,
            attention=False,
            condition_shapes=((32, 32), (64, 64)),
            condition_num_codes=(512, 512),
            condition_channels=512,
            condition_blocks=8,
            dropout=0.25,
        ),
    ),
    # van den Oord et al. 2017, section 4.1: 128 x 128 images in 32 x 32 codes, 256 hidden units.
    "imagenet128": (VQVAE, VQVAEConfig(strides=(4,), channels=256, residual_channels=256)),
    "imagenet128-pixelcnn": (
        GatedPixelCNN,
        GatedPixelCNNConfig(shape=(32, 32), num_codes=512, num_classes=1000, channels=256, kernel_size=5),
    ),
    "digits": (
        VQVAE2,
        VQVAEConfig(
            in_channels=1,
            channels=64,
            residual_channels=32,
            num_codes=128,
            code_dim=32,
            strides=(8, 2),
            codebook_init="kmeans",
            revive_below=0.1,
        ),
    ),
    "digits-top": (
        PixelSNAIL,
        PixelSNAILConfig(
            shape=(2, 2),
            num_codes=128,
            num_classes=10,
            channels=64,
            residual_channels=64,
            kernel_size=3,
            blocks=1,
            layers_per_block=2,
            attention_heads=4,
            condition_channels=64,
            output_blocks=2,
            dropout=0.2,
        ),
    ),
    "digits-bottom": (
        PixelSNAIL,
        PixelSNAILConfig(
            shape=(4, 4),
            num_codes=128,
            num_classes=10,
            level=1,
            channels=64,
            residual_channels=64,
            kernel_size=3,
            blocks=1,
            layers_per_block=4,
            attention_heads=4,
            condition_channels=64,
            condition_blocks=2,
            output_blocks=2,
            dropout=0.2,
            **_DIGITS_CONDITION,
        ),
    ),
    "tiny": (
        VQVAE2,
        VQVAEConfig(
            in_channels=1,
            channels=16,
            residual_channels=8,
            residual_layers=1,
            num_codes=16,
            code_dim=8,
            strides=(4, 2),
            codebook_init="data",
        ),
    ),
    "tiny-top": (PixelSNAIL, PixelSNAILConfig(shape=(2, 2), **_TINY_SNAIL)),
    "tiny-bottom": (
        PixelSNAIL,
        PixelSNAILConfig(shape=(4, 4), level=1, condition_shapes=((2, 2),), condition_num_codes=(16,), **_TINY_SNAIL),
    ),
    "tiny-single": (
        VQVAE,
        VQVAEConfig(
            in_channels=1,
            channels=16,
            residual_channels=8,
            residual_layers=1,
            num_codes=16,
            code_dim=8,
            strides=(4,),
            codebook_init="data",
        ),
    ),
    "tiny-pixelcnn": (
        GatedPixelCNN,
        GatedPixelCNNConfig(shape=(4, 4), layers=2, output_channels=16, **_TINY),
    ),
}


def preset(name: str, **overrides: Any) -> tuple[type[PretrainedModel], Config]:
    """Model class and configuration of a named preset, some fields replaced."""
    if name not in PRESETS:
        raise ArgumentError(f"name: unknown preset {name!r}, expected one of {', '.join(sorted(PRESETS))}")
    model_class, config = PRESETS[name]
    fields = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(overrides) - fields)
    if unknown:
        raise ArgumentError(f"overrides: {type(config).__name__} has no fields {unknown}")
    return model_class, dataclasses.replace(config, **overrides)  # type: ignore[type-var]


def build(config: Config) -> PretrainedModel:
    """A freshly initialised model of a configuration."""
    if isinstance(config, VQVAEConfig):
        return (VQVAE if len(config.strides) == 1 else VQVAE2)(config)
    if isinstance(config, PixelSNAILConfig):
        return PixelSNAIL(config)
    if isinstance(config, GatedPixelCNNConfig):
        return GatedPixelCNN(config)
    raise ArgumentError(f"config: no model is built from a {type(config).__name__}")
