"""Scores of whole sets: kernel distance of features, and the Inception score of class probabilities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvq._check import require_floating, require_positive_int, require_shape, require_tensor
from fastvq.data.base import permutation, random_words
from fastvq.errors import ArgumentError

# Apart from the domains of fastvq.data: the same seed gives other words for these purposes.
DOMAIN_SUBSETS, DOMAIN_SPLITS = 4, 5


class Score(NamedTuple):
    """A mean over parts and its standard deviation between them."""

    mean: float
    deviation: float


def kernel_distance(real: Tensor, fake: Tensor, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0) -> Score:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / F + 1)^3, as KID (Binkowski et al. 2018).

    Args:
        real, fake: features, floating [N, F] and [M, F]; computed in float64.
        subset_size: vectors of either set in a subset; without replacement.
        subsets: random subsets to average over.
        seed: of the subsets.

    Raises:
        ArgumentError: features of different sizes, or a set smaller than a subset.
    """
    for name, vectors in (("real", real), ("fake", fake)):
        require_floating(name, require_tensor(name, vectors))
        require_shape(name, vectors, ["N", real.shape[-1]])
        if vectors.shape[0] < require_positive_int("subset_size", subset_size, minimum=2):
            raise ArgumentError(
                f"{name}: expected at least subset_size = {subset_size} vectors, got {vectors.shape[0]}"
            )
    require_positive_int("subsets", subsets)
    values = []
    for subset in range(subsets):
        x, y = (
            vectors[torch.from_numpy(permutation(len(vectors), seed, 2 * subset + side, DOMAIN_SUBSETS)[:subset_size])]
            for side, vectors in enumerate((real.double(), fake.double()))
        )
        cross = _kernel(x, y).mean()
        values.append(_mean_off_diagonal(_kernel(x, x)) + _mean_off_diagonal(_kernel(y, y)) - 2 * cross)
    return _summary(torch.stack(values))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(square: Tensor) -> Tensor:
    size = square.shape[0]
    return (square.sum() - square.trace()) / (size * (size - 1))


def _summary(values: Tensor) -> Score:
    return Score(float(values.mean()), float(values.std(correction=0)))


class InceptionScore:
    """The Inception score of a stream of class logits, per split (Salimans et al. 2016).

    It is exp of the mean over images of the Kullback-Leibler divergence of p(y | x) from p(y), its mean.

    The split of image i is drawn from its number alone, so that only sums are kept, batches of any size give the same
    score, and a stream that goes through the classes in turn still puts all of them into every split.

    Args:
        num_classes: of the logits.
        splits: parts of the stream that have a score each.
        first: number of the first image to come in the stream.

    Attributes:
        seen: number of images.
    """

    def __init__(self, num_classes: int, *, splits: int = 10, first: int = 0) -> None:
        require_positive_int("num_classes", num_classes)
        require_positive_int("splits", splits)
        self.seen = 0
        self._next = require_positive_int("first", first, minimum=0)
        self._counts = torch.zeros(splits, dtype=torch.int64)
        self._probabilities = torch.zeros(splits, num_classes, dtype=torch.float64)
        self._entropies = torch.zeros(splits, dtype=torch.float64)

    @property
    def num_classes(self) -> int:
        """Number of classes that the logits are of."""
        return self._probabilities.shape[1]

    def update(self, logits: Tensor) -> None:
        """Add logits [B, num_classes]."""
        require_floating("logits", require_tensor("logits", logits))
        require_shape("logits", logits, ["B", self.num_classes])
        logs = logits.detach().cpu().double().log_softmax(1)
        words = random_words(0, 0, DOMAIN_SPLITS, self._next, len(logs))[:, 0]
        split = torch.from_numpy((words % np.uint64(len(self._counts))).astype(np.int64))
        self._counts += torch.bincount(split, minlength=len(self._counts))
        self._probabilities.index_add_(0, split, logs.exp())
        self._entropies.index_add_(0, split, (logs.exp() * logs).sum(1))
        self.seen += len(logs)
        self._next += len(logs)

    def merge(self, other: InceptionScore) -> None:
        """Add the images that the ``other`` object has seen of the same stream.

        Raises:
            ArgumentError: another number of classes or splits.
        """
        if self._probabilities.shape != other._probabilities.shape:
            ours, theirs = (list(score._probabilities.shape) for score in (self, other))
            raise ArgumentError(f"other: expected [splits, num_classes] {ours}, got {theirs}")
        self._counts = self._counts + other._counts
        self._probabilities = self._probabilities + other._probabilities
        self._entropies = self._entropies + other._entropies
        self.seen += other.seen
        self._next = max(self._next, other._next)

    @property
    def ready(self) -> bool:
        """Whether every split has an image."""
        return bool((self._counts > 0).all())

    def state(self) -> dict[str, Tensor]:
        """The sums, to be stored and given to :meth:`from_state` with the number of images seen."""
        return {"counts": self._counts, "probabilities": self._probabilities, "entropies": self._entropies}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], seen: int, *, first: int = 0) -> InceptionScore:
        """The score of ``seen`` images from number ``first`` on, of whose ``state`` :meth:`state` gave the sums."""
        splits, num_classes = state["probabilities"].shape
        score = cls(num_classes, splits=splits, first=first)
        score._counts, score._probabilities = state["counts"], state["probabilities"]
        score._entropies, score.seen, score._next = state["entropies"], seen, first + seen
        return score

    def compute(self) -> Score:
        """The score's mean over splits and its deviation between them.

        Raises:
            ArgumentError: a split without images.
        """
        if not self.ready:
            raise ArgumentError(f"splits: too few images for {len(self._counts)} splits, got {self.seen}")
        marginal = self._probabilities / self._counts[:, None]
        divergence = self._entropies / self._counts - torch.xlogy(marginal, marginal).sum(1)
        return _summary(divergence.clamp(min=0).exp())
