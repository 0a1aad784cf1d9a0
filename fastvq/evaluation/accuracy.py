"""Classification accuracy score (Ravuri and Vinyals 2019)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastvq.data.augment import Augment
from fastvq.data.base import ImageDataset
from fastvq.distributed import alone
from fastvq.errors import ArgumentError
from fastvq.models.classifier import ClassifierConfig
from fastvq.training import TrainConfig
from fastvq.training.classifier import accuracies, train_classifier

Images = tuple[ImageDataset, np.ndarray]


def classification_accuracy(
    sets: Mapping[str, Images],
    test: Images,
    model_config: ClassifierConfig,
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    augment: Augment | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Accuracy on real images of classifiers that learned from different sets of images.

    The score of a model is that of its samples: they teach what real images teach only as far as they show it. The
    same classifier on reconstructions and on real images gives the bounds.

    Args:
        sets: images (data set and indices) to train on, by name; each trains a classifier of its own, alike in
            architecture, settings and seed.
        test: real images that none of them holds.
        model_config, config: architecture of the classifiers, and how they learn.
        folder: receives a run per set.
        augment: of all sets alike.

    Returns:
        ``top1``, ``nll`` and, with more than five classes, ``top5`` of every set; see
        :func:`fastvq.training.classifier.accuracies`.

    Raises:
        ArgumentError: images without labels, or of other channels or classes than the classifier's.
    """
    dataset, indices = test
    if len(indices) == 0:
        raise ArgumentError("test: expected at least one image, got none")
    if not sets:
        raise ArgumentError("sets: expected at least one set of images, got none")
    for name, (images, _) in {**sets, "test": test}.items():
        found = (images.channels, images.num_classes, tuple(images.size))
        wanted = (model_config.in_channels, model_config.num_classes, tuple(dataset.size))
        if found != wanted:
            raise ArgumentError(f"{name}: expected (channels, classes, size) {wanted}, got {found}")
    nothing = np.empty(0, dtype=np.int64)
    results = {}
    for name, (images, rows) in sets.items():
        run = Path(folder) / name.replace(" ", "-")
        # Whichever group this process belongs to, the others do not train this one with it.
        with alone():
            model = train_classifier(
                images,
                model_config,
                config,
                run,
                indices=rows,
                # Nothing is chosen by the test images: they are looked at once, at the end.
                validation=(dataset, nothing),
                augment=augment,
                progress=progress,
            )
        results[name] = accuracies(model, dataset, indices)
    return results
