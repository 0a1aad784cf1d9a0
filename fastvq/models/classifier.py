"""A convolutional classifier: features and labels for evaluation and rejection sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import (
    require_floating,
    require_number,
    require_positive_int,
    require_shape,
    require_tensor,
    require_tuple,
)
from fastvq._config import Config
from fastvq.errors import ArgumentError
from fastvq.models.limits import LARGEST, MOST_LAYERS
from fastvq.models.pretrained import PretrainedModel


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Config):
    """A classifier of images of any size.

    Args:
        in_channels: image channels.
        num_classes: number of labels.
        channels: width of each stage; every stage halves the image's sides.
        features: size of the vector before the last layer, which serves as an image's features.
        dropout: on that vector.
    """

    in_channels: int = 3
    num_classes: int = 1000
    channels: tuple[int, ...] = (32, 64, 128)
    features: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(require_positive_int, "in_channels", "num_classes", "features", maximum=LARGEST)
        self._require(require_number, "dropout", least=0, below=1)
        self._require(require_tuple, "channels")
        if not self.channels:
            raise ArgumentError("channels: expected the width of one stage or more, got none")
        if len(self.channels) > MOST_LAYERS:
            raise ArgumentError(f"channels: expected at most {MOST_LAYERS} stages, got {len(self.channels)}")
        for width in self.channels:
            require_positive_int("channels", width, maximum=LARGEST)

    @property
    def least_tensors(self) -> int:
        return len(self.channels)


def _stage(narrow: int, wide: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for source, stride in ((narrow, 1), (wide, 2)):
        # Normalised per image: what a classifier says of an image must not depend on the others in its batch.
        layers += [nn.Conv2d(source, wide, 3, stride=stride, padding=1), nn.GroupNorm(math.gcd(8, wide), wide)]
        layers.append(nn.ReLU())
    return layers


class Classifier(PretrainedModel):
    """Convolutions, the mean over positions, a feature vector, and one logit per class.

    Args:
        config, fields: a configuration, or its fields as keywords, alone or to replace some.
    """

    config_class: ClassVar[type[ClassifierConfig]] = ClassifierConfig
    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = config = self.config_class.of(config, fields)
        layers: list[nn.Module] = []
        for narrow, wide in zip((config.in_channels, *config.channels[:-1]), config.channels, strict=True):
            layers += _stage(narrow, wide)
        self.body = nn.Sequential(*layers)
        self.embedding = nn.Linear(config.channels[-1], config.features)
        self.head = nn.Linear(config.features, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors [B, features] of images [B, C, H, W] in [-1, 1].

        Raises:
            ArgumentError, ArgumentTypeError: not images, or of other channels.
        """
        require_floating("images", require_tensor("images", images))
        require_shape("images", images, ["B", self.config.in_channels, "H", "W"])
        return self.embedding(self.body(images).mean((2, 3)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, num_classes] of the feature vectors ``features`` [B, features]."""
        return self.head(F.dropout(F.relu(features), self.config.dropout, self.training))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W] in [-1, 1]."""
        return self.classify(self.features(images))
