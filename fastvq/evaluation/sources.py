"""Samples and reconstructions as data sets, so that whatever measures real images measures them alike."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvq._bar import bar
from fastvq._check import require_integer, require_positive_int
from fastvq._evaluation import in_evaluation
from fastvq._files import new_array
from fastvq._shards import StoredShard
from fastvq._tensors import smallest_type
from fastvq._unwrap import require_model
from fastvq.data.base import ImageDataset
from fastvq.data.codes import model_checksum
from fastvq.errors import ArgumentError
from fastvq.models import HierarchicalVQVAE
from fastvq.sampling import Pipeline
from fastvq.sampling.autoencoder import AnyAutoencoder, OwnAutoencoder, weight_of
from fastvq.training.classifier import images_of

_CHUNK = 512
# The golden ratio, modulo 1, in units of 2^-64.
_GOLDEN = 0x9E3779B97F4A7C15


class StoredRows:
    """A tensor of integers whose rows lie in several parts, as an array: only those rows are read that are asked for.

    Args:
        shape: of a row.
        indices: rows of the whole that it has.
    """

    def __init__(self, parts: Sequence[StoredShard], name: str, shape: tuple[int, ...], indices: range) -> None:
        self._parts, self._name, self._shape, self._indices = parts, name, shape, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """int64 [B, *shape]."""
        rows = np.arange(self._indices.start, self._indices.stop)[rows]
        found = np.empty((len(rows), *self._shape), np.int64)
        for part in self._parts:
            (here,) = np.nonzero((rows >= part.indices.start) & (rows < part.indices.stop))
            for run in np.split(here, np.flatnonzero(np.diff(rows[here]) != 1) + 1):
                if len(run):
                    first = int(rows[run[0]]) - part.indices.start
                    found[run] = part.rows(self._name, slice(first, first + len(run)))
        return found


class DrawnSamples:
    """Samples as codes in files, decoded when they are asked for: memory does not grow with them.

    :func:`draw_samples` and :func:`samples_from_shards` make them.

    Args:
        pipeline: what drew them, and decodes them.
        arrays: codes of each level, integers [n, h, w], top first.
        labels, seed, settings: see below.

    Attributes:
        labels: class of each sample, int64 [n]; None for unconditional priors.
        seed: of the draws.
        settings: of the draws: what :meth:`Pipeline.sample` was given beside label and seed.
    """

    labels: Tensor | None

    def __init__(
        self,
        pipeline: Pipeline,
        arrays: Sequence[np.ndarray | StoredRows],
        labels: Tensor | None,
        seed: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.channels, *size = pipeline.image_shape
        self.size = (size[0], size[1])
        self.num_classes = pipeline.num_classes
        classes = range(pipeline.num_classes or 0)
        self.class_names = pipeline.class_names or tuple(str(index) for index in classes)
        self.labels, self.seed, self.settings = labels, seed, dict(settings)
        self._pipeline, self._arrays = pipeline, list(arrays)

    def __len__(self) -> int:
        return len(self._arrays[0])

    @property
    def temperature(self) -> tuple[float, ...]:
        """One value if all levels have the same, else one for each, top first."""
        given = self.settings.get("temperature", 1.0)
        return once_if_same(given if isinstance(given, (list, tuple)) else [given])

    def codes(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """Codes of the samples at ``indices``: int64 [B, h, w] for each level, top first."""
        return tuple(torch.from_numpy(np.asarray(array[indices], dtype=np.int64)) for array in self._arrays)

    @torch.no_grad()
    def batch(self, indices: np.ndarray) -> Tensor:
        """The images at ``indices``: float32 [B, C, H, W], clamped to [-1, 1]."""
        vqvae, device = self._pipeline.vqvae, self._pipeline.device
        images = in_evaluation(vqvae).decode([codes.to(device) for codes in self.codes(indices)])
        return images.float().clamp(-1, 1).cpu()

    def image(self, index: int) -> Tensor:
        """Image number ``index``: float32 [C, H, W], clamped to [-1, 1]."""
        return self.batch(np.array([index]))[0]

    def fingerprint(self) -> str:
        """A hash of the autoencoder and all codes and labels, the same in every process."""
        digest = hashlib.sha256(model_checksum(self._pipeline.vqvae).encode())
        for array in self._arrays:
            for start in range(0, len(array), _CHUNK):
                digest.update(np.asarray(array[start : start + _CHUNK], dtype=np.int64).tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return f"samples-{len(self)}-{digest.hexdigest()}"


def once_if_same(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(values[:1] if len(set(values)) == 1 else values)


def labels_by_frequency(labels: Tensor, indices: range) -> Tensor:
    """Classes of samples by their ``indices``, int64 [n], as often as ``labels`` [N] has them.

    Sample i has the label at i times the golden ratio, modulo 1, of the way through the sorted labels: any stretch of
    samples is near the frequencies, and the class of a sample depends on nothing but its index.

    Raises:
        ArgumentError, ArgumentTypeError: no integers [N], or none at all.
    """
    if require_integer("labels", labels).ndim != 1 or len(labels) == 0:
        raise ArgumentError(f"labels: expected one label or more, [N], got shape {list(labels.shape)}")
    steps = np.arange(indices.start, indices.stop, indices.step, dtype=np.uint64) * np.uint64(_GOLDEN)
    places = (steps >> np.uint64(32)) * np.uint64(len(labels)) >> np.uint64(32)
    return labels.long().sort().values[torch.from_numpy(places.astype(np.int64))]


def draw_samples(
    pipeline: Pipeline,
    n: int,
    folder: str | os.PathLike[str],
    *,
    label: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> DrawnSamples:
    """Draw samples, some hundreds at a time, into files of a folder; sample i is that of ``pipeline.sample``.

    Args:
        pipeline: what draws them.
        n: how many.
        folder: an empty or new folder; it must outlive the result.
        label: classes, int64 [n], such as those of :func:`labels_by_frequency`; by default all in turn.
        seed: any integer, taken modulo 2**64.
        settings: of :meth:`Pipeline.sample`: temperature, top_k, top_p, engine, ...

    Raises:
        ArgumentError, ArgumentTypeError: arguments that do not fit.
        DiskFullError: there is no room for all codes; nothing has been drawn then.
    """
    require_positive_int("n", n)
    if label is None:
        label = pipeline.labels(range(n))
    if label is not None and label.shape != (n,):
        raise ArgumentError(f"label: expected shape [{n}], got {list(label.shape)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [
        new_array(
            folder / f"level{level}.npy",
            (n, *prior.config.shape),
            smallest_type(prior.config.num_codes),
        )
        for level, prior in enumerate(pipeline.priors)
    ]
    with bar("samples", show=progress, total=n) as shown:
        for start in range(0, n, _CHUNK):
            size = min(_CHUNK, n - start)
            part = None if label is None else label[start : start + size]
            samples = pipeline.sample(size, label=part, seed=seed, start=start, **settings)
            for array, codes in zip(arrays, samples.codes, strict=True):
                array[start : start + size] = codes.cpu().numpy()
            shown.update(size)
    return DrawnSamples(pipeline, arrays, label, seed, settings)


class Reconstructions:
    """What an autoencoder makes of a data set's images, with their labels.

    Args:
        vqvae: the autoencoder.
        dataset: images of its channels and size.

    Raises:
        ArgumentError, ArgumentTypeError: no autoencoder, or images of other channels.
    """

    labels: Tensor | None

    def __init__(self, vqvae: AnyAutoencoder | nn.Module, dataset: ImageDataset) -> None:
        if not isinstance(vqvae, OwnAutoencoder):
            vqvae = require_model("vqvae", vqvae, HierarchicalVQVAE)
        wanted = vqvae.image_shape[0] if isinstance(vqvae, OwnAutoencoder) else vqvae.config.in_channels
        if dataset.channels != wanted:
            raise ArgumentError(f"dataset: has {dataset.channels} channel(s), the model takes {wanted}")
        self.size, self.channels, self.num_classes = dataset.size, dataset.channels, dataset.num_classes
        self.class_names, self.labels = dataset.class_names, dataset.labels
        self._vqvae, self._dataset = vqvae, dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @torch.no_grad()
    def batch(self, indices: np.ndarray) -> Tensor:
        """The images at ``indices``: float32 [B, C, H, W], clamped to [-1, 1]."""
        images = images_of(self._dataset, indices).to(weight_of(self._vqvae).device)
        vqvae = in_evaluation(self._vqvae)
        return vqvae.decode(vqvae.encode(images)).float().clamp(-1, 1).cpu()

    def image(self, index: int) -> Tensor:
        """Image number ``index``: float32 [C, H, W], clamped to [-1, 1]."""
        return self.batch(np.array([index]))[0]

    def fingerprint(self) -> str:
        """A hash of the autoencoder and the images, the same in every process."""
        return f"reconstructions-{model_checksum(self._vqvae)}-{self._dataset.fingerprint()}"
