"""What every data set of images offers, and how one is split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastvq._check import require_number, require_positive_int, require_seed
from fastvq.errors import ArgumentError, ArgumentTypeError

# Domains of the counter-based generator: the same seed never gives the same words for two purposes.
DOMAIN_AUGMENT, DOMAIN_ORDER, DOMAIN_SPLIT, DOMAIN_DROPOUT = 0, 1, 2, 6


class ImageDataset(Protocol):
    """Images of one size and, perhaps, one label each.

    Attributes:
        labels: int64 [N] in 0..num_classes-1, or None.
        class_names: one name per label; empty without labels.
        channels: 1 or 3.
        size: (H, W) in pixels.
    """

    labels: Tensor | None
    class_names: tuple[str, ...]
    channels: int
    size: tuple[int, int]

    def __len__(self) -> int: ...

    @property
    def num_classes(self) -> int | None:
        """Number of labels, or None without labels."""

    def image(self, index: int) -> Tensor:
        """Image number ``index``: float32 [C, H, W] in [-1, 1]."""

    def fingerprint(self) -> str:
        """A hash of what the data are, the same in every process."""


def load_images(dataset: ImageDataset, indices: Iterable[int]) -> Tensor:
    """The images of a ``dataset`` at some ``indices``: float32 [B, C, H, W] in [-1, 1]."""
    images = [dataset.image(int(index)) for index in indices]
    return torch.stack(images) if images else torch.empty(0, dataset.channels, *dataset.size, dtype=torch.float32)


def random_words(seed: int, stream: int, domain: int, first: int, count: int) -> np.ndarray:
    """Blocks ``first .. first + count - 1`` of four random 64-bit words, uint64 [count, 4], of a Philox generator.

    Raw words rather than NumPy's distributions: those may change from one NumPy version to the next.
    """
    generator = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=[first, 0, 0, domain])
    return np.asarray(generator.random_raw(4 * count)).reshape(count, 4)


def permutation(n: int, seed: int, stream: int, domain: int) -> np.ndarray:
    """A random order of 0..n-1, int64 [n], that depends on the arguments alone."""
    words = random_words(seed, stream, domain, 0, -(-n // 4)).reshape(-1)[:n]
    return np.argsort(words, kind="stable")


def split_indices(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices 0..n-1 in two sorted int64 arrays (training, validation).

    Args:
        n: number of items.
        fraction: share of the validation part, in [0, 1). Above 0 it gets at least one item.
        seed: the split depends on (n, fraction, seed) alone.

    Raises:
        ArgumentError: a value out of range, or nothing remains to train on.
    """
    require_positive_int("n", n)
    require_seed("seed", seed)
    require_number("fraction", fraction, least=0, below=1)
    count = held_out(n, fraction)
    if count >= n:
        raise ArgumentError(f"fraction: {fraction} of {n} items leaves nothing to train on")
    order = permutation(n, seed, 0, DOMAIN_SPLIT)
    return np.sort(order[count:]), np.sort(order[:count])


def held_out(n: int, fraction: float) -> int:
    """How many of n items :func:`split_indices` holds out."""
    return max(1, round(n * fraction)) if fraction > 0 else 0


def spread_over_classes(labels: Tensor | None, total: int, count: int) -> np.ndarray:
    """Some of ``total`` items to look at, int64 [min(count, total)]: of all classes in turn, sorted by class.

    Of more classes than ``count`` evenly spaced ones are taken; of a class, and of items without labels, evenly spaced
    items.

    Args:
        labels: int64 [total], or None.
        total: at least 1.
    """
    count = min(count, total)
    if labels is None:
        return np.arange(count) * total // count
    classes = labels.numpy()
    present = np.unique(classes)
    several = min(count, len(present))
    shown = present[np.arange(several) * len(present) // several]
    members = {one: np.flatnonzero(classes == one) for one in shown}
    taken = dict.fromkeys(shown, 0)
    while (missing := count - sum(taken.values())) > 0:
        open_classes = [one for one in shown if taken[one] < len(members[one])]
        for one in open_classes[:missing]:
            taken[one] += 1
    return np.concatenate([members[one][np.arange(n) * len(members[one]) // n] for one, n in taken.items()])


def require_size(name: str, size: object) -> tuple[int, int]:
    """An int for a square, or (H, W), as a pair."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ArgumentTypeError(f"{name}: expected an int or a pair (height, width), got {size!r}")
    return require_positive_int(name, pair[0]), require_positive_int(name, pair[1])


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error ``mse`` between images in [-1, 1].

    Their range of 2 is the peak: 10 log10(4 / mse), infinite for 0.
    """
    return math.inf if mse == 0 else 10 * (math.log10(4) - math.log10(mse))
