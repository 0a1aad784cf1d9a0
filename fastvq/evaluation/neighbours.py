"""Metrics that compare two sets of feature vectors by balls around nearest neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq._check import require_floating, require_positive_int, require_shape, require_tensor
from fastvq.errors import ArgumentError

_BLOCK_BYTES = 64 << 20
# Above the rounding of products of some thousand features, relative to the vectors' squared lengths.
_HAIR = 1e-12


class ManifoldScores(NamedTuple):
    """Result of :func:`manifold_scores`.

    Attributes:
        precision: share of the samples inside the real manifold.
        recall: share of the real images inside the samples' manifold.
        density: number of real balls that a sample lies in, over k; not bounded by 1.
        coverage: share of the real balls that hold a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: Tensor, fake: Tensor, *, neighbours: int = 3) -> ManifoldScores:
    """Precision, recall, density and coverage of a set of feature vectors.

    Kynkaanniemi et al. 2019, equations 1 to 3 (improved precision and recall); Naeem et al. 2020, equations 2 and 4
    (density and coverage).

    The manifold of a set is the union of closed balls, one around each vector, that reach to its k-th nearest
    neighbour in the same set, itself not counted. Distances are computed in float64, a block at a time.

    Args:
        real, fake: features, floating [N, F] and [M, F].
        neighbours: k.

    Raises:
        ArgumentError: features of different sizes, or a set with no more than k vectors.
    """
    require_positive_int("neighbours", neighbours)
    for name, vectors in (("real", real), ("fake", fake)):
        _check_vectors(name, vectors, real.shape[-1])
        if vectors.shape[0] <= neighbours:
            raise ArgumentError(f"{name}: expected more than {neighbours} vectors (neighbours), got {vectors.shape[0]}")
    real, fake = real.double(), fake.double()
    real_reach, fake_reach = _reach(real, neighbours), _reach(fake, neighbours)
    inside_real, balls, inside_fake = 0, 0, 0
    covered = torch.zeros(real.shape[0], dtype=torch.bool, device=real.device)
    recalled = torch.zeros_like(covered)
    for part, reach in _blocks(fake, real.shape[0], fake_reach):
        distance = _squared_distances(part, real)  # [m, N]
        inside = distance <= real_reach
        inside_real += int(inside.any(1).sum())
        balls += int(inside.sum())
        covered |= inside.any(0)
        recalled |= (distance <= reach[:, None]).any(0)
    inside_fake = int(recalled.sum())
    return ManifoldScores(
        precision=inside_real / fake.shape[0],
        recall=inside_fake / real.shape[0],
        density=balls / (neighbours * fake.shape[0]),
        coverage=float(covered.double().mean()),
    )


def nearest_neighbours(queries: Tensor, vectors: Tensor, *, count: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances, float64 [Q, count] in rising order, and indices, int64 [Q, count], of the nearest vectors.

    Args:
        queries, vectors: floating [Q, F] and [N, F].
        count: how many of each, 1..N.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, dtypes or numbers that do not fit, or values that are not finite.
    """
    _check_vectors("vectors", vectors, vectors.shape[-1])
    _check_vectors("queries", queries, vectors.shape[-1])
    if not 1 <= require_positive_int("count", count) <= vectors.shape[0]:
        raise ArgumentError(f"count: expected at most {vectors.shape[0]}, the number of vectors, got {count}")
    vectors = vectors.double()
    found = [
        _squared_distances(part, vectors).topk(count, dim=1, largest=False)
        for part, _ in _blocks(queries.double(), vectors.shape[0])
    ]
    if not found:
        empty = torch.empty(0, count, dtype=torch.float64)
        return empty, empty.long()
    return torch.cat([near.values for near in found]).sqrt(), torch.cat([near.indices for near in found])


def _check_vectors(name: str, vectors: Tensor, features: int) -> None:
    require_floating(name, require_tensor(name, vectors))
    require_shape(name, vectors, ["N", features])
    if not bool(torch.isfinite(vectors).all()):
        raise ArgumentError(f"{name}: expected finite features, got infinite or undefined ones")


def _blocks(vectors: Tensor, columns: int, beside: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Vectors (and values beside them) in parts whose distances to ``columns`` others fit a block."""
    size = max(1, _BLOCK_BYTES // (8 * max(1, columns)))
    beside = vectors if beside is None else beside
    if vectors.shape[0] == 0:
        return []
    return list(zip(vectors.split(size), beside.split(size), strict=True))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[m, n] in float64: as products, whose cancellation costs about 1e-16 of the vectors' squared lengths."""
    lengths = (a * a).sum(1)[:, None] + (b * b).sum(1)
    return torch.addmm(lengths, a, b.T, alpha=-2).clamp_(min=0)


def _reach(vectors: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each vector to its k-th nearest other one, [N], and a hair more.

    A vector exactly at that distance (the k-th neighbour itself, or a copy of it) must be inside, whichever way the
    same distance is rounded the next time it is computed. The hair is by the lengths of these two alone, so that no
    other vector, however long, widens a ball.
    """
    first, reaches = 0, []
    for part, _ in _blocks(vectors, vectors.shape[0]):
        distance = _squared_distances(part, vectors)
        rows = torch.arange(len(part))
        distance[rows, rows + first] = torch.inf
        reaches.append(distance.kthvalue(neighbours, dim=1).values)
        first += len(part)
    reach = torch.cat(reaches)
    # The other vector is at most as long as this one and the distance together.
    return reach + _HAIR * ((vectors * vectors).sum(1) + reach)
