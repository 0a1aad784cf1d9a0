"""Feature extractors: what turns images into the vectors that sample metrics compare, and how they are told apart."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvq._check import require_floating, require_positive_int, require_shape, require_tensor
from fastvq._evaluation import in_evaluation
from fastvq._nvtx import annotate
from fastvq._unwrap import require_model, unwrap
from fastvq.data.codes import model_checksum
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.classifier import Classifier


class Features(NamedTuple):
    """Feature vectors [B, F] of images and, where the extractor is a classifier, its logits [B, num_classes]."""

    vectors: Tensor
    logits: Tensor | None


class FeatureExtractor(nn.Module):
    """Any module from images to vectors, with a name and a hash for the scores it gives.

    Called as a module it returns the vectors alone, so it also serves as ``feature=`` of torchmetrics' metrics.

    Args:
        module: maps images [B, C, H, W] in [-1, 1] to vectors [B, F].
        name: what scores are labelled with; by default the module's class.
        num_features: F; by default found by a first call.
        num_channels: the images' channels, if the module takes only one number of them.
        is_inception: whether these are the Inception features of the FID's definition, whose scores need no other name.

    Attributes:
        digest: SHA-256 over the module's class, structure, parameters and buffers.
        num_classes: of the logits; None without.
    """

    num_classes: int | None = None

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        num_features: int | None = None,
        num_channels: int | None = None,
        is_inception: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ArgumentTypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.name = name or type(module).__name__
        self.num_channels, self.is_inception = num_channels, is_inception
        self._num_features = None if num_features is None else require_positive_int("num_features", num_features)
        self.digest = hashlib.sha256(f"{model_checksum(module)} {self.name} {module!r}".encode()).hexdigest()

    @property
    def num_features(self) -> int:
        """F, the size of a vector.

        Raises:
            ArgumentError: it was not given, and there has been no image yet.
        """
        if self._num_features is None:
            raise ArgumentError("num_features: not known before the first images; pass it to FeatureExtractor")
        return self._num_features

    @property
    def title(self) -> str:
        """Name and short hash."""
        return f"{self.name} {self.digest[:12]}"

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def forward(self, images: Tensor) -> Tensor:
        """Vectors [B, F] of ``images``, as :meth:`extract` gives them."""
        return self.extract(images).vectors

    @annotate("features")
    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        """Vectors and logits of images [B, C, H, W] in [-1, 1]; values outside are clipped.

        Raises:
            ArgumentError, ArgumentTypeError: not images, of other channels, or the module returns something else.
        """
        require_floating("images", require_tensor("images", images))
        require_shape("images", images, ["B", self.num_channels or "C", "H", "W"])
        found = self._extract(images.to(self.device).clamp(-1, 1))
        vectors = require_tensor("module's result", found.vectors)
        require_shape("module's result", vectors, [images.shape[0], self._num_features])
        if self._num_features is None:
            self._num_features = vectors.shape[1]
        return found

    def _extract(self, images: Tensor) -> Features:
        return Features(in_evaluation(self.module)(images), None)


class ClassifierFeatures(FeatureExtractor):
    """The vector before a :class:`fastvq.models.Classifier`'s last layer, and its logits.

    Args:
        classifier: also inside torch.compile, DataParallel, DistributedDataParallel or AveragedModel.
        name: what scores are labelled with; by default ``classifier``.

    Raises:
        ArgumentTypeError: it is no such classifier.
    """

    def __init__(self, classifier: Classifier | nn.Module, *, name: str | None = None) -> None:
        classifier = require_model("classifier", classifier, Classifier)
        config = classifier.config
        super().__init__(
            classifier, name=name or "classifier", num_features=config.features, num_channels=config.in_channels
        )
        self.num_classes = config.num_classes

    def _extract(self, images: Tensor) -> Features:
        assert isinstance(self.module, Classifier)
        classifier = in_evaluation(self.module)
        vectors = classifier.features(images)
        return Features(vectors, classifier.classify(vectors))


def as_extractor(extractor: FeatureExtractor | nn.Module) -> FeatureExtractor:
    """The extractor itself, or one around a module."""
    if isinstance(extractor, FeatureExtractor):
        return extractor
    if isinstance(unwrap(extractor), Classifier):
        return ClassifierFeatures(extractor)
    return FeatureExtractor(extractor)
