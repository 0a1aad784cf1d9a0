"""Mean and covariance of a stream of feature vectors, and the Fréchet distance between two of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._check import require_floating, require_positive_int, require_shape, require_tensor
from fastvq.errors import ArgumentError


class GaussianStatistics:
    """Running mean and covariance of vectors [N, F] in float64, whatever N is.

    Batches are joined by their means and centred sums (Chan, Golub and LeVeque 1979), which loses no digits where a
    sum of squares would: features far from the origin keep their covariance.

    Args:
        num_features: F.

    Attributes:
        count: vectors seen.
        mean: float64 [F].
        scatter: float64 [F, F], the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, num_features: int) -> None:
        require_positive_int("num_features", num_features)
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    @property
    def num_features(self) -> int:
        """F, the size of a vector."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Tensor:
        """float64 [F, F], with N - 1 in the denominator.

        Raises:
            ArgumentError: fewer than two vectors.
        """
        if self.count < 2:
            raise ArgumentError(f"statistics: a covariance needs two vectors or more, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, vectors: Tensor) -> None:
        """Add vectors [B, F].

        Raises:
            ArgumentError, ArgumentTypeError: another shape or dtype, or a value that is not finite.
        """
        require_floating("vectors", require_tensor("vectors", vectors))
        require_shape("vectors", vectors, ["B", self.num_features])
        if vectors.shape[0] == 0:
            return
        if not bool(torch.isfinite(vectors).all()):
            raise ArgumentError("vectors: expected finite features, got infinite or undefined ones")
        batch = GaussianStatistics(self.num_features)
        wide = vectors.detach().cpu().double()
        batch.count, batch.mean = wide.shape[0], wide.mean(0)
        centred = wide - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: GaussianStatistics) -> None:
        """Add the vectors that the ``other`` object has seen.

        Raises:
            ArgumentError: they have another size.
        """
        _check_sizes(self, other)
        if other.count == 0:
            return
        total = self.count + other.count
        step = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.count * other.count / total)
        self.mean = self.mean + step * (other.count / total)
        self.count = total


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """The Fréchet distance of two sets of vectors, taken for Gaussians of their means and covariances.

    m1, m2 and C1, C2 being those, ``(m1 - m2)^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Dowson and Landau 1982; FID: Heusel
    et al. 2017).

    The trace of the root is the sum of the singular values of R1^T R2, where C = R R^T: real and not negative by
    construction, where the root of C1 C2 itself has imaginary parts from rounding. Nor is a root taken of a product's
    eigenvalues: one that should be 0, of features that are constant or depend on each other, is 1e-16 by rounding and
    would add 1e-8.

    Args:
        first, second: statistics of the sets.

    Raises:
        ArgumentError: different sizes of features, or no more vectors than features, whose covariance has no inverse
            and whose distance says more about their number than about them.
    """
    _check_sizes(first, second)
    for name, statistics in (("first", first), ("second", second)):
        if statistics.count <= statistics.num_features:
            raise ArgumentError(
                f"{name}: expected more vectors than the {statistics.num_features} features, got {statistics.count}"
            )
    overlap = torch.linalg.svdvals(_root(first.covariance).T @ _root(second.covariance)).sum()
    difference = first.mean - second.mean
    distance = difference @ difference + first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """R [F, F] with R R^T the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _check_sizes(first: GaussianStatistics, second: GaussianStatistics) -> None:
    if first.num_features != second.num_features:
        raise ArgumentError(f"second: expected vectors of {first.num_features} features, got {second.num_features}")
