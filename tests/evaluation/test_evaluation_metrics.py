"""Distances between sets of feature vectors against closed forms, brute force and other implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from evaluation_helpers import gaussian
from helpers import refuses
from scipy.linalg import sqrtm
from torch import Tensor, nn

from fastvq.data.base import random_words
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.evaluation import (
    GaussianStatistics,
    InceptionScore,
    frechet_distance,
    kernel_distance,
    manifold_scores,
    nearest_neighbours,
    neighbours,
)
from fastvq.evaluation.scores import DOMAIN_SPLITS


def statistics_of(vectors: Tensor) -> GaussianStatistics:
    statistics = GaussianStatistics(vectors.shape[1])
    statistics.update(vectors)
    return statistics


def of_moments(mean: np.ndarray, covariance: np.ndarray) -> GaussianStatistics:
    statistics = GaussianStatistics(len(mean))
    statistics.count = 1000
    statistics.mean, statistics.scatter = torch.from_numpy(mean), torch.from_numpy(covariance) * 999
    return statistics


def random_covariance(size: int, rank: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    return factor @ factor.T


@pytest.mark.parametrize("batches", [[57], [1] * 57, [30, 27], [0, 19, 1, 37, 0]], ids=["one", "single", "two", "odd"])
def test_streamed_moments_are_those_of_all_vectors(batches: list[int]) -> None:
    vectors = gaussian(57, 5, scale=2, shift=1).double()
    statistics = GaussianStatistics(5)
    for part in vectors.split(batches):
        statistics.update(part)
    assert statistics.count == 57
    torch.testing.assert_close(statistics.mean, vectors.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(statistics.covariance, vectors.T.cov(), rtol=1e-12, atol=1e-12)


def test_features_far_from_the_origin_keep_their_covariance() -> None:
    near = gaussian(400, 4).double()
    far = GaussianStatistics(4)
    for part in (near + 1e6).split(64):
        far.update(part)
    torch.testing.assert_close(far.covariance, near.T.cov(), rtol=1e-8, atol=1e-8)


def test_merging_is_updating_with_both() -> None:
    vectors = gaussian(40, 3)
    parts = [statistics_of(part) for part in vectors.split([11, 29])]
    parts[0].merge(parts[1])
    torch.testing.assert_close(parts[0].covariance, statistics_of(vectors).covariance)


def test_frechet_distance_of_axis_aligned_gaussians() -> None:
    variances = np.array([[1.0, 4.0, 0.25], [9.0, 1.0, 0.25]])
    means = np.array([[0.0, 1.0, 2.0], [3.0, 1.0, -2.0]])
    first, second = (of_moments(m, np.diag(v)) for m, v in zip(means, variances, strict=True))
    closed = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(closed, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [9, 4], ids=["full-rank", "singular"])
def test_frechet_distance_against_a_matrix_root(rank: int) -> None:
    covariances = [random_covariance(9, rank, seed) for seed in (0, 1)]
    means = np.random.default_rng(2).normal(size=(2, 9))
    # A small multiple of the identity keeps scipy's root of a singular product real.
    ridge = 1e-12 * np.eye(9)
    root = sqrtm((covariances[0] + ridge) @ (covariances[1] + ridge))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * np.real(root))
    found = frechet_distance(*(of_moments(m, c) for m, c in zip(means, covariances, strict=True)))
    assert found == pytest.approx(expected, rel=1e-5 if rank < 9 else 1e-9)


def test_frechet_distance_of_features_that_depend_on_each_other() -> None:
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.normal(size=(30, 30)))[0]
    variances = random.uniform(0.5, 2, size=(2, 30)) * (np.arange(30) < 12)
    first, second = (of_moments(np.zeros(30), axes @ np.diag(v) @ axes.T) for v in variances)
    closed = ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(closed, rel=1e-12)
    # What another order of the same sums changes, changes no more than that.
    second.scatter = second.scatter * (1 + 1e-15 * torch.from_numpy(random.normal(size=(30, 30))))
    assert frechet_distance(first, second) == pytest.approx(closed, rel=1e-12)


def test_frechet_distance_of_samples_comes_near_that_of_their_gaussians() -> None:
    first, second = gaussian(20_000, 3), gaussian(20_000, 3, seed=1, scale=1.5, shift=0.5)
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(3 * 0.25 + 3 * 0.25, abs=0.05)


def brute_kernel_distance(real: Tensor, fake: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(vectors: Tensor) -> float:
        return (
            math.fsum(kernel(x, y) for x, y in itertools.permutations(vectors, 2)) / len(vectors) / (len(vectors) - 1)
        )

    across = math.fsum(kernel(x, y) for x in real for y in fake) / len(real) / len(fake)
    return within(real) + within(fake) - 2 * across


def test_kernel_distance_against_loops() -> None:
    real, fake = gaussian(13, 4).double(), gaussian(13, 4, seed=1, shift=0.4).double()
    score = kernel_distance(real, fake, subset_size=13, subsets=2)
    assert score.mean == pytest.approx(brute_kernel_distance(real, fake), rel=1e-12)
    assert score.deviation == pytest.approx(0, abs=1e-12)


def test_kernel_distance_over_subsets_is_unbiased_and_repeatable() -> None:
    real, fake = gaussian(300, 4).double(), gaussian(300, 4, seed=1, shift=0.5).double()
    score = kernel_distance(real, fake, subset_size=60, subsets=200, seed=3)
    whole = kernel_distance(real, fake, subset_size=300, subsets=1)
    assert abs(score.mean - whole.mean) < 4 * score.deviation / math.sqrt(200)
    assert score == kernel_distance(real, fake, subset_size=60, subsets=200, seed=3)
    assert score != kernel_distance(real, fake, subset_size=60, subsets=200, seed=4)


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_inception_score_by_hand(batch: int) -> None:
    logits = gaussian(50, 6, scale=3)
    score = InceptionScore(6, splits=4)
    for part in logits.split(batch):
        score.update(part)
    places = random_words(0, 0, DOMAIN_SPLITS, 0, 50)[:, 0] % np.uint64(4)
    values = []
    for split in range(4):
        p = logits[torch.from_numpy(places == split)].double().softmax(1)
        values.append(float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp()))
    assert score.compute() == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)


def test_inception_score_has_its_bounds() -> None:
    sure, unsure = InceptionScore(5, splits=1), InceptionScore(5, splits=1)
    sure.update(1e4 * torch.eye(5).repeat(8, 1))
    unsure.update(torch.zeros(40, 5))
    assert sure.compute().mean == pytest.approx(5)
    assert unsure.compute().mean == pytest.approx(1)


def test_inception_score_of_classes_in_turn() -> None:
    score = InceptionScore(10)
    score.update(1e4 * torch.eye(10).repeat(300, 1))
    assert score.compute().mean == pytest.approx(10, rel=0.05)


def test_scores_agree_with_torchmetrics() -> None:
    fid, kid, inception_score = (
        pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid", "inception")
    )

    class Features(nn.Identity):
        num_features = 6

    real, fake = gaussian(90, 6).double(), gaussian(70, 6, seed=1, scale=1.3, shift=0.2).double()
    theirs = fid.FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    for part in real.split(32):
        theirs.update(part, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(statistics_of(real), statistics_of(fake))
    assert float(theirs.compute()) == pytest.approx(ours, rel=1e-9)
    kernel = kid.KernelInceptionDistance(feature=Features(), subsets=1, subset_size=70)
    kernel.update(real[:70], real=True)
    kernel.update(fake, real=False)
    ours = kernel_distance(real[:70], fake, subset_size=70, subsets=1).mean
    assert float(kernel.compute()[0]) == pytest.approx(ours, rel=1e-9)
    inception = inception_score.InceptionScore(feature=Features(), splits=1)
    inception.update(fake)
    score = InceptionScore(6, splits=1)
    score.update(fake)
    assert float(inception.compute()[0]) == pytest.approx(score.compute().mean, rel=1e-9)


def brute_manifold(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def reach(points: np.ndarray) -> list[float]:
        return [sorted(math.dist(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]

    reach_real, reach_fake = reach(real), reach(fake)
    inside = [[math.dist(f, r) <= reach_real[i] for i, r in enumerate(real)] for f in fake]
    precision = sum(any(row) for row in inside) / len(fake)
    recall = sum(any(math.dist(f, r) <= reach_fake[j] for j, f in enumerate(fake)) for r in real) / len(real)
    density = sum(map(sum, inside)) / (k * len(fake))
    coverage = sum(any(row[i] for row in inside) for i in range(len(real))) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("block", [neighbours._BLOCK_BYTES, 8 * 200], ids=["whole", "blocks"])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shape", [(31, 31, 3), (19, 45, 2), (40, 8, 7)], ids=str)
def test_manifold_scores_against_brute_force(
    shape: tuple[int, int, int], k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block)
    real, fake = gaussian(shape[0], shape[2]), gaussian(shape[1], shape[2], seed=1, scale=1.2, shift=0.3)
    expected = brute_manifold(real.double().numpy(), fake.double().numpy(), k)
    assert manifold_scores(real, fake, neighbours=k) == pytest.approx(expected, abs=1e-12)


def two_clusters(n: int, seed: int = 0) -> Tensor:
    return gaussian(n, 2, seed=seed, scale=0.1) + torch.tensor([10.0, 0.0]) * (torch.arange(n)[:, None] % 2)


def test_manifold_scores_of_constructed_sets() -> None:
    real = two_clusters(100)
    same = manifold_scores(real, real.clone(), neighbours=3)
    assert same[:2] == (1, 1)
    assert same.coverage == 1
    # A ball around a vector holds itself and its k neighbours.
    assert same.density == pytest.approx(4 / 3)
    assert manifold_scores(real, real + 100, neighbours=3) == (0, 0, 0, 0)
    one_mode = manifold_scores(real, two_clusters(200, seed=0)[::2][:50], neighbours=3)
    assert (one_mode.precision, one_mode.recall, one_mode.coverage) == (1, 0.5, 0.5)
    half_wrong = torch.cat([real[:50], real[:50] + 100])
    assert manifold_scores(real, half_wrong, neighbours=3).precision == 0.5


def test_distant_vectors_widen_no_ball_but_their_own() -> None:
    distant = torch.tensor([[1e8, 0.0], [1e8 + 100, 0.0]])
    real = torch.cat([gaussian(60, 2), distant])
    scores = manifold_scores(real, gaussian(40, 2, seed=1) + 20, neighbours=1)
    assert (scores.precision, scores.density, scores.coverage) == (0, 0, 0)


def test_an_outlier_inflates_recall_but_not_coverage() -> None:
    real = gaussian(60, 2)
    fake = torch.cat([gaussian(8, 2, seed=1, scale=0.05) + 6, torch.tensor([[-300.0, 0.0]])])
    scores = manifold_scores(real, fake, neighbours=3)
    assert scores.recall == 1
    assert scores.coverage < 0.2


@pytest.mark.parametrize("block", [neighbours._BLOCK_BYTES, 1], ids=["whole", "rows"])
def test_nearest_neighbours(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block)
    queries, vectors = gaussian(5, 4), gaussian(17, 4, seed=1)
    distances, indices = nearest_neighbours(queries, vectors, count=3)
    for query, distance, index in zip(queries, distances, indices, strict=True):
        every = torch.tensor([math.dist(query.tolist(), vector.tolist()) for vector in vectors], dtype=torch.float64)
        expected = every.sort()
        torch.testing.assert_close(distance, expected.values[:3])
        assert index.tolist() == expected.indices[:3].tolist()


A, B = gaussian(12, 3), gaussian(12, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: statistics_of(A).update(B), ArgumentError, r"vectors: expected shape \[B, 3\], got \[12, 4\]"),
        (lambda: statistics_of(A / 0), ArgumentError, "vectors: expected finite features"),
        (lambda: statistics_of(A).update(A.long()), ArgumentTypeError, "vectors: expected a floating-point tensor"),
        (
            lambda: frechet_distance(statistics_of(A[:3]), statistics_of(A)),
            ArgumentError,
            "first: expected more vectors than the 3 features, got 3",
        ),
        (
            lambda: frechet_distance(statistics_of(A), statistics_of(A[:2])),
            ArgumentError,
            "second: expected more vectors than the 3 features, got 2",
        ),
        (
            lambda: frechet_distance(statistics_of(A), statistics_of(B)),
            ArgumentError,
            "second: expected vectors of 3 features, got 4",
        ),
        (lambda: GaussianStatistics(2).covariance, ArgumentError, "statistics: a covariance needs two vectors"),
        (lambda: manifold_scores(A, B), ArgumentError, r"fake: expected shape \[N, 3\], got \[12, 4\]"),
        (lambda: manifold_scores(A, A[:3], neighbours=3), ArgumentError, "fake: expected more than 3 vectors"),
        (lambda: manifold_scores(A, A, neighbours=0), ArgumentError, "neighbours: must be at least 1"),
        (lambda: manifold_scores(A, A / 0), ArgumentError, "fake: expected finite features"),
        (lambda: nearest_neighbours(A, A, count=13), ArgumentError, "count: expected at most 12"),
        (lambda: kernel_distance(A, B, subset_size=4), ArgumentError, r"fake: expected shape \[N, 3\]"),
        (lambda: kernel_distance(A, A), ArgumentError, "real: expected at least subset_size = 1000 vectors, got 12"),
        (lambda: InceptionScore(3).compute(), ArgumentError, "splits: too few images for 10 splits, got 0"),
        (lambda: InceptionScore(3).update(B), ArgumentError, r"logits: expected shape \[B, 3\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(call: object, error: type[Exception], message: str) -> None:
    with refuses(error, message):
        call()  # type: ignore[operator]
