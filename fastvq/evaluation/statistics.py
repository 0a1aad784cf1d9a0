"""Everything sample metrics need of a set of images, gathered in one pass with bounded memory, and kept in files."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastvq._bar import bar
from fastvq._check import require_positive_int, wrapped_seed
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
    random words. So batches of any size give the same selection, and memory does not grow with the stream. Objects that
    saw other parts of one stream are put together by :meth:`merge`, in any order.

    Args:
        num_features: F.
        num_classes: of the logits, if there are any.
        keep: number of vectors to keep, for the metrics of nearest neighbours and kernels.
        seed: of the selection.
        first: number of the first vector to come in the stream.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_classes: int | None = None,
        keep: int = KEPT_VECTORS,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        self.keep, self.seed = require_positive_int("keep", keep), wrapped_seed("seed", seed)
        self.gaussian = GaussianStatistics(num_features)
        self.inception = None if num_classes is None else InceptionScore(num_classes, first=first)
        # What of the stream has been seen: ranges in order, the last of which goes on.
        self._spans = [range(require_positive_int("first", first, minimum=0), first)]
        self._words = np.empty(0, dtype=np.uint64)
        self._numbers = np.empty(0, dtype=np.int64)
        self._vectors = torch.empty(0, num_features, dtype=torch.float32)

    @property
    def count(self) -> int:
        """Number of vectors seen."""
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
        """Add the ``features`` of a batch of images.

        Raises:
            ArgumentError, ArgumentTypeError: of another size, without logits, or not finite.
        """
        first, size = self._spans[-1].stop, features.vectors.shape[0]
        self.gaussian.update(features.vectors)
        if self.inception is not None:
            if features.logits is None:
                raise ArgumentError("features: expected logits beside the vectors, got none")
            self.inception.update(features.logits)
        self._spans[-1] = range(self._spans[-1].start, first + size)
        words = random_words(self.seed, 0, DOMAIN_KEPT, first, size)[:, 0]
        new = np.arange(size)
        if len(self._words) == self.keep:
            # Late in a stream few get in; copying all that is kept for nothing would cost more than the features.
            new = np.flatnonzero(words < self._words.max())
            if len(new) == 0:
                return
        self._select(words[new], first + new, features.vectors[torch.from_numpy(new)].detach().cpu().float())

    def merge(self, other: FeatureStatistics) -> None:
        """Add what the ``other`` object has seen of the same stream.

        The count and the vectors kept are those of one object that saw both; means, covariances and the sums of the
        Inception score are, up to the rounding of float64 sums in another order.

        Raises:
            ArgumentError: another size of features, number of classes or selection, or a vector seen by both.
        """
        for name, ours, theirs in zip(_SETTINGS, self._settings(), other._settings(), strict=True):
            if ours != theirs:
                raise ArgumentError(f"other: expected {name} {ours}, got {theirs}")
        self._spans = _joined([*self._spans, *other._spans])
        self.gaussian.merge(other.gaussian)
        if self.inception is not None and other.inception is not None:
            self.inception.merge(other.inception)
        self._select(other._words, other._numbers, other._vectors)

    def _settings(self) -> tuple[int | None, ...]:
        classes = None if self.inception is None else self.inception.num_classes
        return self.gaussian.num_features, classes, self.keep, self.seed

    def _select(self, words: np.ndarray, numbers: np.ndarray, vectors: Tensor) -> None:
        """Keep of the vectors kept and some more those with the smallest words, in the order of the stream."""
        words, numbers = np.concatenate([self._words, words]), np.concatenate([self._numbers, numbers])
        chosen = np.lexsort((numbers, words))[: self.keep]
        chosen = chosen[np.argsort(numbers[chosen])]
        self._words, self._numbers = words[chosen], numbers[chosen]
        self._vectors = torch.cat([self._vectors, vectors])[torch.from_numpy(chosen)]

    def state(self) -> dict[str, Tensor]:
        """Sums and vectors, to be stored and given to :meth:`from_state` with the settings."""
        tensors = {
            "mean": self.gaussian.mean,
            "scatter": self.gaussian.scatter,
            "words": torch.from_numpy(self._words.view(np.int64)),
            "numbers": self.numbers,
            "vectors": self.vectors,
        }
        if self.inception is not None:
            tensors |= {f"inception/{name}": tensor for name, tensor in self.inception.state().items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], count: int, *, keep: int, seed: int, first: int = 0
    ) -> FeatureStatistics:
        """Statistics of the vectors ``first .. first + count - 1`` of a stream, from what :meth:`state` gave.

        Args:
            state: the tensors.
            count: number of vectors that were seen.
            keep, seed, first: as the object was made with.

        Raises:
            ArgumentError: a tensor of another type or shape than :meth:`state` gives.
            KeyError: one is missing.
        """
        mean, numbers, words, vectors = (state[name] for name in ("mean", "numbers", "words", "vectors"))
        kept, features = vectors.shape
        for name, tensor, dtype, shape in (
            ("mean", mean, torch.float64, (features,)),
            ("scatter", state["scatter"], torch.float64, (features, features)),
            ("numbers", numbers, torch.int64, (kept,)),
            ("words", words, torch.int64, (kept,)),
            ("vectors", vectors, torch.float32, (min(count, keep), features)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ArgumentError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}")
        sums = {name.removeprefix("inception/"): t for name, t in state.items() if name.startswith("inception/")}
        statistics = cls(features, keep=keep, seed=seed, first=first)
        statistics._spans = [range(first, first + count)]
        statistics.gaussian.count = count
        statistics.gaussian.mean, statistics.gaussian.scatter = mean, state["scatter"]
        statistics._words = words.numpy().view(np.uint64)
        statistics._numbers, statistics._vectors = numbers.numpy(), vectors
        statistics.inception = InceptionScore.from_state(sums, count, first=first) if sums else None
        return statistics


_SETTINGS = ("num_features", "num_classes", "keep", "seed")


def _joined(spans: Iterable[range]) -> list[range]:
    """Ranges in order, neighbours as one; the last may be empty.

    Raises:
        ArgumentError: a number in two of them.
    """
    joined: list[range] = []
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        if joined and span.start < joined[-1].stop and len(span):
            raise ArgumentError(
                f"other: vectors {span.start}..{min(span.stop, joined[-1].stop) - 1} of the stream are in both"
            )
        if joined and span.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


def gather(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    *,
    keep: int = KEPT_VECTORS,
    seed: int = 0,
    first: int = 0,
) -> FeatureStatistics:
    """Statistics of a stream of images.

    Args:
        batches: images [B, C, H, W] in [-1, 1].
        extractor: what gives their features.
        keep, seed, first: of :class:`FeatureStatistics`.

    Raises:
        ArgumentError, ArgumentTypeError: no batch, or images or features that do not fit.
    """
    statistics: FeatureStatistics | None = None
    for images in batches:
        features = extractor.extract(images)
        if statistics is None:
            classes = None if features.logits is None else features.logits.shape[1]
            size = features.vectors.shape[1]
            statistics = FeatureStatistics(size, num_classes=classes, keep=keep, seed=seed, first=first)
        statistics.update(features)
    if statistics is None:
        raise ArgumentError("batches: expected at least one batch of images, got none")
    return statistics


def image_batches(
    dataset: ImageDataset, indices: np.ndarray, batch_size: int, title: str, *, progress: bool = False
) -> Iterator[Tensor]:
    """The images of some indices, in order, ``batch_size`` at a time."""
    starts = range(0, len(indices), batch_size)
    for start in bar(title, show=progress, items=starts):
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
        dataset, indices: the images: all of them, and which, int [N].
        extractor: what gives their features.
        keep, seed: of :class:`FeatureStatistics`.
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
    tensors = statistics.state()
    entries = {"format": FORMAT, "count": statistics.count, "keep": statistics.keep, "seed": statistics.seed}
    metadata = {name: str(value) for name, value in entries.items()}
    metadata[_CHECKSUM] = _checksum(metadata, tensors)
    with replacing_file(path) as temporary:
        save_tensors(tensors, temporary, metadata=metadata)


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
        count, keep, seed = (int(metadata[name]) for name in ("count", "keep", "seed"))
        return FeatureStatistics.from_state(tensors, count, keep=keep, seed=seed)


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

    Args:
        real, fake: statistics of the real images' features, and of the set's.
        neighbours: k of precision, recall, density and coverage.
        seed: of the subsets of KID.

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
