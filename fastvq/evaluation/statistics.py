"""Everything sample metrics need of a set of images, gathered in one pass with bounded memory, and kept in files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastvq._check import require_positive_int, require_seed
from fastvq._files import reading, replacing_file, save_tensors
from fastvq._tensors import read_safetensors
from fastvq.data.base import ImageDataset, random_words
from fastvq.errors import ArgumentError, CorruptFileError
from fastvq.evaluation.features import FeatureExtractor, Features
from fastvq.evaluation.gaussian import GaussianStatistics, frechet_distance
from fastvq.evaluation.neighbours import ManifoldScores, manifold_scores
from fastvq.evaluation.scores import InceptionScore, Score, kernel_distance
from fastvq.training.classifier import images_of

FORMAT = 1
# Apart from the domains of fastvq.data: the same seed gives other words for this purpose.
DOMAIN_KEPT = 3
KEPT_VECTORS = 10_000
_CHECKSUM = "checksum"


class FeatureStatistics:
    """Mean and covariance of all feature vectors, a random selection of the vectors, and the Inception score's sums.

    Which vectors are kept depends on (seed, number of the vector in the stream) alone: those with the smallest keyed
    random words. So batches of any size give the same selection, and memory does not grow with the stream.

    Args:
        num_features: F.
        num_classes: of the logits, if there are any.
        keep: number of vectors to keep, for the metrics of nearest neighbours and kernels.
        seed: of the selection.
    """

    def __init__(
        self, num_features: int, *, num_classes: int | None = None, keep: int = KEPT_VECTORS, seed: int = 0
    ) -> None:
        self.keep, self.seed = require_positive_int("keep", keep), require_seed("seed", seed)
        self.gaussian = GaussianStatistics(num_features)
        self.inception = None if num_classes is None else InceptionScore(num_classes)
        self._words = np.empty(0, dtype=np.uint64)
        self._numbers = np.empty(0, dtype=np.int64)
        self._vectors = torch.empty(0, num_features, dtype=torch.float32)

    @property
    def count(self) -> int:
        return self.gaussian.count

    @property
    def vectors(self) -> Tensor:
        """The vectors kept, float32 [min(count, keep), F], in the order of the stream."""
        return self._vectors

    @property
    def numbers(self) -> Tensor:
        """Place of each vector kept in the stream, int64."""
        return torch.from_numpy(self._numbers)

    def update(self, features: Features) -> None:
        """Add the features of a batch of images."""
        first, size = self.count, features.vectors.shape[0]
        self.gaussian.update(features.vectors)
        if self.inception is not None:
            if features.logits is None:
                raise ArgumentError("features: expected logits beside the vectors, got none")
            self.inception.update(features.logits)
        words = random_words(self.seed, 0, DOMAIN_KEPT, first, size)[:, 0]
        new = np.arange(size)
        if len(self._words) == self.keep:
            # Late in a stream few get in; copying all that is kept for nothing would cost more than the features.
            new = np.flatnonzero(words < self._words.max())
            if len(new) == 0:
                return
        words = np.concatenate([self._words, words[new]])
        numbers = np.concatenate([self._numbers, first + new])
        vectors = torch.cat([self._vectors, features.vectors[torch.from_numpy(new)].detach().cpu().float()])
        chosen = np.sort(np.argsort(words, kind="stable")[: self.keep])
        self._words, self._numbers, self._vectors = words[chosen], numbers[chosen], vectors[torch.from_numpy(chosen)]


def gather(
    batches: Iterable[Tensor], extractor: FeatureExtractor, *, keep: int = KEPT_VECTORS, seed: int = 0
) -> FeatureStatistics:
    """Statistics of a stream of batches of images [B, C, H, W] in [-1, 1]."""
    statistics: FeatureStatistics | None = None
    for images in batches:
        features = extractor.extract(images)
        if statistics is None:
            classes = None if features.logits is None else features.logits.shape[1]
            statistics = FeatureStatistics(features.vectors.shape[1], num_classes=classes, keep=keep, seed=seed)
        statistics.update(features)
    if statistics is None:
        raise ArgumentError("batches: expected at least one batch of images, got none")
    return statistics


def image_batches(
    dataset: ImageDataset, indices: np.ndarray, batch_size: int, title: str, *, progress: bool = False
) -> Iterator[Tensor]:
    """The images of some indices, in order, ``batch_size`` at a time."""
    from tqdm import tqdm

    starts = range(0, len(indices), batch_size)
    for start in tqdm(starts, title, disable=not progress, file=sys.stderr):
        yield images_of(dataset, indices[start : start + batch_size])


def dataset_statistics(
    dataset: ImageDataset,
    indices: np.ndarray,
    extractor: FeatureExtractor,
    *,
    keep: int = KEPT_VECTORS,
    seed: int = 0,
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> FeatureStatistics:
    """Statistics of real images, read from ``cache`` when the same have been gathered before.

    Args:
        cache: folder of ``features-*.safetensors`` files, each named by a hash of the data's fingerprint, the indices,
            the extractor's digest, ``keep`` and ``seed``. A damaged file is written anew, with a warning.
    """
    path = (
        None if cache is None else Path(cache) / f"features-{_key(dataset, indices, extractor, keep, seed)}.safetensors"
    )
    if path is not None and path.is_file():
        try:
            return _load(path)
        except CorruptFileError as error:
            warnings.warn(f"{path} is damaged and is written anew ({error})", stacklevel=2)
    batches = image_batches(dataset, indices, batch_size, "features of real images", progress=progress)
    statistics = gather(batches, extractor, keep=keep, seed=seed)
    if path is not None:
        _save(path, statistics)
    return statistics


def _key(dataset: ImageDataset, indices: np.ndarray, extractor: FeatureExtractor, keep: int, seed: int) -> str:
    rows = hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()
    return hashlib.sha256(
        json.dumps([FORMAT, dataset.fingerprint(), rows, extractor.digest, keep, seed]).encode()
    ).hexdigest()[:32]


def _save(path: Path, statistics: FeatureStatistics) -> None:
    gaussian, inception = statistics.gaussian, statistics.inception
    tensors = {
        "mean": gaussian.mean,
        "scatter": gaussian.scatter,
        "words": torch.from_numpy(statistics._words.view(np.int64)),
        "numbers": statistics.numbers,
        "vectors": statistics.vectors,
    }
    if inception is not None:
        tensors |= {f"inception/{name}": tensor for name, tensor in inception.state().items()}
    entries = {"format": FORMAT, "count": gaussian.count, "keep": statistics.keep, "seed": statistics.seed}
    metadata = {name: str(value) for name, value in entries.items()}
    metadata[_CHECKSUM] = _checksum(metadata, tensors)
    with replacing_file(path) as temporary:
        save_tensors(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata=metadata,
        )


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(sorted((n, v) for n, v in metadata.items() if n != _CHECKSUM)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(path: Path) -> FeatureStatistics:
    """What :func:`_save` wrote; files of older versions have no checksum.

    Raises:
        CorruptFileError: anything else.
    """
    with reading(f"{path}: not a file of statistics"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = read_safetensors(path)
        if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(metadata, tensors):
            raise ValueError(f"its contents do not fit the {_CHECKSUM} among them")
        entries = {name: int(value) for name, value in metadata.items() if name != _CHECKSUM}
        mean, numbers, words, vectors = (tensors[name] for name in ("mean", "numbers", "words", "vectors"))
        kept, features = vectors.shape
        for name, tensor, dtype, shape in (
            ("mean", mean, torch.float64, (features,)),
            ("scatter", tensors["scatter"], torch.float64, (features, features)),
            ("numbers", numbers, torch.int64, (kept,)),
            ("words", words, torch.int64, (kept,)),
            ("vectors", vectors, torch.float32, (min(entries["count"], entries["keep"]), features)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}")
        sums = {name.removeprefix("inception/"): t for name, t in tensors.items() if name.startswith("inception/")}
        statistics = FeatureStatistics(features, keep=entries["keep"], seed=entries["seed"])
        statistics.gaussian.count = entries["count"]
        statistics.gaussian.mean, statistics.gaussian.scatter = mean, tensors["scatter"]
        statistics._words = words.numpy().view(np.uint64)
        statistics._numbers, statistics._vectors = numbers.numpy(), vectors
        statistics.inception = InceptionScore.from_state(sums, entries["count"]) if sums else None
        return statistics


class SetScores(NamedTuple):
    """How a set of images compares with the real ones; entries that cannot be computed are None.

    Attributes:
        images: in the set.
        frechet: :func:`frechet_distance`; None with no more images than features in either set.
        kernel: :func:`kernel_distance` of the vectors kept; None with fewer than ten.
        inception: the set's own Inception score; None without logits.
        manifold: :func:`manifold_scores` of the vectors kept; None with no more than k vectors.
        vectors: vectors kept of the real images and of the set.
    """

    images: int
    frechet: float | None
    kernel: Score | None
    inception: Score | None
    manifold: ManifoldScores | None
    vectors: tuple[int, int]


_KERNEL_MINIMUM = 10
_KERNEL_SUBSET = 1000


def compare(real: FeatureStatistics, fake: FeatureStatistics, *, neighbours: int = 3, seed: int = 0) -> SetScores:
    """All scores of a set against the real images.

    Raises:
        ArgumentError: features of different sizes.
    """
    features = real.gaussian.num_features
    if fake.gaussian.num_features != features:
        raise ArgumentError(f"fake: expected features of size {features}, got {fake.gaussian.num_features}")
    sizes = (len(real.vectors), len(fake.vectors))
    return SetScores(
        images=fake.count,
        frechet=frechet_distance(real.gaussian, fake.gaussian) if min(real.count, fake.count) > features else None,
        kernel=kernel_distance(real.vectors, fake.vectors, subset_size=min(_KERNEL_SUBSET, *sizes), seed=seed)
        if min(sizes) >= _KERNEL_MINIMUM
        else None,
        inception=fake.inception.compute() if fake.inception is not None and fake.inception.ready else None,
        manifold=manifold_scores(real.vectors, fake.vectors, neighbours=neighbours)
        if min(sizes) > neighbours
        else None,
        vectors=sizes,
    )
