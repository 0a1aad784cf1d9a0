"""Models built of fields as keywords, and how their configurations show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import refuses

from fastvq import VQVAE, VQVAE2, GatedPixelCNN, PixelSNAIL
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import Classifier, GatedPixelCNNConfig, PixelSNAILConfig, VQVAEConfig
from fastvq.models.classifier import ClassifierConfig

SMALL: dict[str, Any] = {"channels": 8, "residual_channels": 4, "residual_layers": 1, "num_codes": 5, "code_dim": 3}
PIXELS: dict[str, Any] = {"shape": (3, 4), "num_codes": 5, "channels": 4, "layers": 1, "output_channels": 4}
SNAIL: dict[str, Any] = {
    "shape": [3, 4], "num_codes": 5, "channels": 4, "residual_channels": 4, "kernel_size": 3, "blocks": 1,
    "layers_per_block": 1, "attention_heads": 2,
}  # fmt: skip

BUILT: dict[str, tuple[Callable[..., Any], type, dict[str, Any]]] = {
    "snail": (PixelSNAIL, PixelSNAILConfig, SNAIL),
    "pixelcnn": (GatedPixelCNN, GatedPixelCNNConfig, PIXELS),
    "vqvae": (VQVAE, VQVAEConfig, {**SMALL, "strides": (4,)}),
    "vqvae2": (VQVAE2, VQVAEConfig, {**SMALL, "strides": (2, 2)}),
}


@pytest.mark.parametrize(("model", "config", "fields"), BUILT.values(), ids=BUILT.keys())
def test_fields_alone_beside_and_in_a_configuration(model: Any, config: Any, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    wanted = model(config(**fields))
    torch.manual_seed(0)
    found = model(**fields)
    assert found.config == wanted.config == model(wanted.config).config
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())
    changed = model(wanted.config, channels=12)
    assert changed.config == config(**{**fields, "channels": 12})
    assert wanted.config.channels == fields["channels"]


def test_a_classifier_of_fields() -> None:
    assert Classifier(num_classes=3, channels=(8,)).config == ClassifierConfig(num_classes=3, channels=(8,))


def test_an_autoencoder_of_one_level_is_one_by_itself() -> None:
    assert VQVAE(**SMALL).config == VQVAEConfig(**SMALL, strides=(4,))
    assert VQVAE2(**SMALL).config == VQVAEConfig(**SMALL)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "typo": (
        lambda: PixelSNAIL(**SNAIL, dropuot=0.1),
        ArgumentError,
        "PixelSNAILConfig: no field 'dropuot', expected one of dropout,",
    ),
    "typo-beside": (
        lambda: GatedPixelCNN(GatedPixelCNNConfig(**PIXELS), chanels=8),
        ArgumentError,
        "GatedPixelCNNConfig: no field 'chanels', expected one of channels, ",
    ),
    "typo-vqvae": (
        lambda: VQVAE(num_code=5),
        ArgumentError,
        "VQVAEConfig: no field 'num_code', expected one of num_codes,",
    ),
    "missing": (lambda: PixelSNAIL(shape=(3, 4)), ArgumentError, r"PixelSNAILConfig: missing fields \['num_codes'\]"),
    "nothing": (GatedPixelCNN, ArgumentError, r"GatedPixelCNNConfig: missing fields \['shape', 'num_codes'\]"),
    "no-configuration": (
        lambda: PixelSNAIL((3, 4)),
        ArgumentTypeError,
        r"config: expected a PixelSNAILConfig, or its fields as keywords, got tuple \(3, 4\)",
    ),
    "another-configuration": (
        lambda: PixelSNAIL(GatedPixelCNNConfig(**PIXELS)),
        ArgumentTypeError,
        r"config: expected a PixelSNAILConfig, .* got GatedPixelCNNConfig GatedPixelCNNConfig\(shape=",
    ),
    "value": (lambda: PixelSNAIL(**SNAIL, dropout=2), ArgumentError, "dropout: must lie in"),
    "levels": (lambda: VQVAE(strides=(2, 2)), ArgumentError, "config.strides: VQVAE has one level"),
}


@pytest.mark.parametrize(("build", "error", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with refuses(error, message):
        build()


def test_a_configuration_shows_what_differs_from_its_defaults() -> None:
    config = PixelSNAILConfig(shape=(8, 8), num_codes=512, dropout=0.0)
    assert repr(config) == "PixelSNAILConfig(shape=(8, 8), num_codes=512, dropout=0.0)"
    assert eval(repr(config)) == config
    assert repr(VQVAEConfig()) == "VQVAEConfig()"
