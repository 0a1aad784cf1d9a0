"""Training of a classifier of images, by the loop that both stages share."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.data.augment import Augment
from fastvq.data.base import ImageDataset, load_images, split_indices
from fastvq.distributed import Group
from fastvq.errors import ArgumentError
from fastvq.models.classifier import Classifier, ClassifierConfig
from fastvq.training.batches import Batch
from fastvq.training.config import TrainConfig
from fastvq.training.loop import train_in
from fastvq.training.progress import Show
from fastvq.training.task import Picture

_TOP = 5


def train_classifier(
    dataset: ImageDataset,
    model_config: ClassifierConfig,
    config: TrainConfig,
    run_dir: str | os.PathLike[str],
    *,
    indices: np.ndarray | None = None,
    validation: tuple[ImageDataset, np.ndarray] | None = None,
    split_seed: int | None = None,
    augment: Augment | None = None,
    resume: bool = False,
    init_from: str | os.PathLike[str] | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: Show = False,
) -> Classifier:
    """Train a classifier on labelled images, minimising the cross entropy.

    ``run_dir`` is laid out, and several processes train together, as in :func:`train_vqvae`. Validation, when it is due
    there: those of :func:`accuracies`, and ``nll`` in nats per image.

    Args:
        indices: images to train on, int [N]; by default those that ``config.validation_fraction`` does not hold out.
        validation: data and indices to validate on; by default the images held out. Must be given with ``indices``.
        split_seed: of the images held out, where several classifiers share them; by default ``config.seed``.
        augment: changes of the training images, drawn anew each epoch.
        resume: go on with the run in ``run_dir`` from its newest checkpoint, to ``config.steps``; a run that has them
            (or more) and its model returns that at once.
        init_from: start from the weights of a saved model, a run or a checkpoint (:func:`load_weights`).
        notes: anything JSON can hold, to be kept in ``config.json``.
        progress: as of :func:`train_vqvae`.

    Returns:
        The classifier with averaged weights, in evaluation mode.

    Raises:
        ArgumentError: data, model and settings do not fit together.
        FileConflictError, MissingFileError, CorruptFileError, DivergedError, PeerError: as in :func:`train_vqvae`.
    """
    model = train_in(
        run_dir,
        lambda: _prepared(dataset, model_config, config, indices, validation, split_seed, augment),
        lambda: Classifier(model_config),
        config,
        resume=resume,
        init_from=init_from,
        notes=notes,
        progress=progress,
    )
    assert isinstance(model, Classifier)
    return model


def _prepared(
    dataset: ImageDataset,
    model_config: ClassifierConfig,
    config: TrainConfig,
    indices: np.ndarray | None,
    validation: tuple[ImageDataset, np.ndarray] | None,
    split_seed: int | None,
    augment: Augment | None,
) -> tuple[_Classification, dict[str, Any]]:
    """What the loop needs, and the description of the run, of arguments that fit together."""
    if (indices is None) != (validation is None):
        raise ArgumentError("indices and validation: expected both or neither, got one of them")
    if indices is None or validation is None:
        split_seed = config.seed if split_seed is None else split_seed
        indices, held_out = split_indices(len(dataset), config.validation_fraction, split_seed)
        validation = (dataset, held_out)
    for name, data in (("dataset", dataset), ("validation", validation[0])):
        _check_data(name, data, model_config)
    if len(indices) == 0:
        raise ArgumentError("indices: expected at least one image to train on, got none")
    description: dict[str, Any] = {
        "format": 1,
        "stage": "classifier",
        "model": {"class": Classifier.__name__, **model_config.to_dict()},
        "train": config.to_dict(),
        "data": {
            "fingerprint": dataset.fingerprint(),
            "images": len(indices),
            "indices": hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest(),
            "size": list(dataset.size),
            "validation": None if validation[0] is dataset else validation[0].fingerprint(),
            "augment": None if augment is None else dataclasses.asdict(augment),
        },
    }
    return _Classification(dataset, indices, validation, config, augment), description


@torch.no_grad()
def accuracies(
    model: nn.Module, dataset: ImageDataset, indices: np.ndarray, *, batch_size: int = 64
) -> dict[str, float]:
    """Shares in [0, 1] of images whose label a classifier ranks first (``top1``) and among the first five (``top5``).

    ``top5`` is there with more than five classes only; ``nll`` is the mean cross entropy in nats per image.
    """
    labels = dataset.labels
    if labels is None:
        raise ArgumentError("dataset: expected images with labels, got none")
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    first, top, nll, classes = 0, 0, 0.0, 0
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        logits = model(images_of(dataset, part).to(device)).float()
        wanted, classes = labels[torch.from_numpy(part)].to(device), logits.shape[1]
        hits = logits.topk(min(_TOP, classes), dim=1).indices == wanted[:, None]
        first, top = first + int(hits[:, 0].sum()), top + int(hits.sum())
        nll += float(F.cross_entropy(logits, wanted, reduction="sum"))
    count = len(indices)
    values = {"top1": first / count, "nll": nll / count}
    return {**values, "top5": top / count} if classes > _TOP else values


def images_of(dataset: ImageDataset, indices: np.ndarray) -> Tensor:
    """Images [B, C, H, W] of some indices, at once where the data can give a batch faster than one by one."""
    batch = getattr(dataset, "batch", None)
    return load_images(dataset, indices) if batch is None else batch(indices)


def _check_data(name: str, dataset: ImageDataset, config: ClassifierConfig) -> None:
    if dataset.labels is None:
        raise ArgumentError(f"{name}: a classifier learns from labels, which these images do not have")
    if dataset.channels != config.in_channels:
        raise ArgumentError(f"model_config.in_channels: {config.in_channels}, {name} has {dataset.channels}")
    if dataset.num_classes != config.num_classes:
        raise ArgumentError(f"model_config.num_classes: {config.num_classes}, {name} has {dataset.num_classes}")


class _Classification:
    criterion = "nll"
    unit = "images"

    def __init__(
        self,
        dataset: ImageDataset,
        indices: np.ndarray,
        validation: tuple[ImageDataset, np.ndarray],
        config: TrainConfig,
        augment: Augment | None,
    ) -> None:
        self.rows = len(indices)
        self._dataset, self._indices, self._validation = dataset, indices, validation
        self._part = config.batch_size // config.accumulate
        self._seed, self._augment = config.seed, augment

    def load(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        indices = self._indices[rows]
        images = images_of(self._dataset, indices)
        if self._augment is not None:
            # Variant 0 is the unchanged image, so the first epoch takes variant 1.
            images = self._augment.batch(images, seed=self._seed, indices=indices, variants=epochs + 1)
        assert self._dataset.labels is not None
        return images, self._dataset.labels[torch.from_numpy(indices)]

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        logits = forward(images).float()
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def accumulation(self, model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        return contextlib.nullcontext({})

    def validate(self, model: nn.Module, device: torch.device, group: Group) -> dict[str, float]:
        dataset, indices = self._validation
        if len(indices) == 0:
            return {}
        with group.together():
            own = indices[group.share(len(indices))]
            found = accuracies(model, dataset, own, batch_size=self._part) if len(own) else {}
        names = ["top1", "nll", *(["top5"] if (dataset.num_classes or 0) > _TOP else [])]
        totals = group.sum([found.get(name, 0.0) * len(own) for name in names])
        return {name: total / len(indices) for name, total in zip(names, totals, strict=True)}

    def brief(self, metrics: Mapping[str, float]) -> str:
        return f"loss {metrics['loss']:.4f}, accuracy {100 * metrics['accuracy']:.0f} %"

    def summary(self, values: Mapping[str, float]) -> str:
        more = f", top-{_TOP} {100 * values['top5']:.2f} %" if "top5" in values else ""
        return f"NLL {values['nll']:.4f} nats, top-1 accuracy {100 * values['top1']:.2f} %{more}"

    def concern(self, values: Mapping[str, float]) -> str | None:
        return None

    def picture(self, model: nn.Module, device: torch.device, step: int) -> Picture | None:
        return None
