"""Rejection sampling by a classifier (Razavi et al. 2019, section 3.3), and what it trades for what."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastvq._bar import bar
from fastvq._check import (
    require_number,
    require_positive_int,
    require_shape,
    require_tensor,
)
from fastvq._evaluation import in_evaluation
from fastvq._files import new_array
from fastvq.data.base import random_words
from fastvq.errors import ArgumentError
from fastvq.evaluation.features import FeatureExtractor
from fastvq.evaluation.gaussian import GaussianStatistics, frechet_distance
from fastvq.evaluation.neighbours import manifold_scores
from fastvq.evaluation.sources import DrawnSamples
from fastvq.evaluation.statistics import DOMAIN_KEPT, FeatureStatistics, image_batches
from fastvq.sampling import Pipeline
from fastvq.sampling.noise import fixed_seed
from fastvq.sampling.pipeline import Label

_CHUNK = 512
_LEAST_RATE = 0.02


class RejectionSamples(NamedTuple):
    """Result of :func:`sample_with_rejection`.

    Attributes:
        images: float32 [n, C, H, W], clamped to [-1, 1].
        codes: int64 [n, h, w] for each level, top first.
        labels: class asked for, int64 [n]; None for unconditional priors.
        scores: the classifier's probability of that class (of its likeliest class, if unconditional), float64 [n].
        indices: number of each sample among the candidates drawn, int64 [n].
        drawn: candidates drawn in all.
        seed: what to pass to get the same again.
    """

    images: Tensor
    codes: tuple[Tensor, ...]
    labels: Tensor | None
    scores: Tensor
    indices: Tensor
    drawn: int
    seed: int


def sample_with_rejection(
    pipeline: Pipeline,
    n: int,
    classifier: nn.Module,
    *,
    keep: float | None = None,
    threshold: float | None = None,
    label: Label | None = None,
    seed: int | None = None,
    max_drawn: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> RejectionSamples:
    """Draw more samples than asked for and keep exactly n that a classifier recognises best.

    Candidates are the samples 0, 1, 2, ... of ``seed``, so the result depends on the arguments alone. Within each class
    the samples kept come in the order of their index.

    Args:
        pipeline: what draws them.
        n: samples to return.
        classifier: logits [B, num_classes] of images [B, C, H, W] in [-1, 1].
        keep: fraction in (0, 1]: of every class, ``ceil(wanted / keep)`` candidates are drawn and the best are kept.
        threshold: probability in [0, 1): candidates are drawn until enough of every class reach it.
        label: as of :meth:`Pipeline.sample`; by default all classes in turn.
        seed: any integer, taken modulo 2**64; None draws one from PyTorch's global generator.
        max_drawn: candidates after which a threshold is given up; by default 100 for each sample.
        settings: of :meth:`Pipeline.sample`: temperature, top_k, top_p, engine, ...

    Raises:
        ArgumentError: arguments that do not fit, before any sampling; or too few candidates reached ``threshold``.
    """
    wanted = _wanted(pipeline, n, label)
    _check_choice(keep, threshold)
    seed = fixed_seed(seed)
    limit = 100 * n if max_drawn is None else require_positive_int("max_drawn", max_drawn)
    blank = torch.zeros((1, *pipeline.image_shape), dtype=torch.float32, device=pipeline.device)
    class_scores(classifier, blank, None, pipeline.num_classes)
    pool = _Pool(pipeline, classifier, wanted, threshold, seed, settings)
    if keep is not None:
        pool.draw({group: math.ceil(count / keep - 1e-9) for group, count in wanted.items()}, progress)
    else:
        short = dict(wanted)
        while short:
            if pool.drawn >= limit:
                missing = ", ".join(f"{count} of class {group}" for group, count in short.items())
                raise ArgumentError(
                    f"threshold: after {pool.drawn} candidates too few reach {threshold} (missing: {missing}); "
                    "lower it or raise max_drawn"
                )
            batch = {group: count / max(_LEAST_RATE, pool.rate(group)) for group, count in short.items()}
            share = min(1.0, (limit - pool.drawn) / sum(batch.values()))
            pool.draw({group: math.ceil(count * share - 1e-9) for group, count in batch.items()}, progress)
            short = {group: left for group, count in wanted.items() if (left := count - pool.size(group)) > 0}
    return pool.result(pipeline.labels(range(n), label), seed)


def _wanted(pipeline: Pipeline, n: int, label: Label | None) -> dict[int, int]:
    """How many samples of each class; all of them under -1 without classes."""
    require_positive_int("n", n)
    labels = pipeline.labels(range(n), label)
    if labels is None:
        return {-1: n}
    return {group: count for group, count in enumerate(torch.bincount(labels).tolist()) if count}


def _check_choice(keep: float | None, threshold: float | None) -> None:
    if (keep is None) == (threshold is None):
        raise ArgumentError(f"keep and threshold: expected exactly one of them, got {keep} and {threshold}")
    if keep is not None:
        require_number("keep", keep, above=0, most=1)
    if threshold is not None:
        require_number("threshold", threshold, least=0, below=1)


class _Pool:
    """The best candidates of each class so far; no more of them than are wanted."""

    def __init__(
        self,
        pipeline: Pipeline,
        classifier: nn.Module,
        wanted: dict[int, int],
        threshold: float | None,
        seed: int,
        settings: dict[str, Any],
    ) -> None:
        self.drawn = 0
        self._pipeline, self._classifier, self._wanted = pipeline, classifier, wanted
        self._threshold, self._seed, self._settings = threshold, seed, settings
        self._tried = dict.fromkeys(wanted, 0)
        self._passed = dict.fromkeys(wanted, 0)
        # Of each class: index, score, codes of every level, images; a row per candidate kept.
        self._kept: dict[int, list[Tensor]] = {}

    def size(self, group: int) -> int:
        return len(self._kept[group][0]) if group in self._kept else 0

    def rate(self, group: int) -> float:
        return self._passed[group] / self._tried[group] if self._tried[group] else 1.0

    def draw(self, counts: dict[int, int], progress: bool) -> None:
        groups = torch.cat([torch.full((count,), group) for group, count in counts.items()])
        with bar("candidates", show=progress, total=len(groups)) as shown:
            for part in groups.split(_CHUNK):
                label = None if self._pipeline.num_classes is None else part
                drawn = self._pipeline.sample(
                    len(part), label=label, seed=self._seed, start=self.drawn, **self._settings
                )
                scores = class_scores(self._classifier, drawn.images, label, self._pipeline.num_classes)
                index = torch.arange(self.drawn, self.drawn + len(part))
                for group in part.unique().tolist():
                    rows = part == group
                    self._tried[group] += int(rows.sum())
                    if self._threshold is not None:
                        rows &= scores >= self._threshold
                        self._passed[group] += int(rows.sum())
                    new = [index, scores, *(codes.cpu() for codes in drawn.codes), drawn.images.cpu()]
                    self._add(group, [tensor[rows] for tensor in new])
                self.drawn += len(part)
                shown.update(len(part))

    def _add(self, group: int, new: list[Tensor]) -> None:
        old = self._kept.get(group)
        joined = new if old is None else [torch.cat(pair) for pair in zip(old, new, strict=True)]
        index, scores = joined[:2]
        # The first that passed for a threshold; the best, and of equal ones the first, for a fraction.
        order = (
            torch.arange(len(index)) if self._threshold is not None else scores.argsort(descending=True, stable=True)
        )
        chosen = order[: self._wanted[group]].sort().values
        self._kept[group] = [tensor[chosen] for tensor in joined]

    def result(self, labels: Tensor | None, seed: int) -> RejectionSamples:
        if labels is None:
            index, scores, *codes, images = self._kept[-1]
        else:
            # Sorting the classes of the result stably gives the places of each class's samples, in order.
            order = labels.argsort(stable=True)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
            parts = zip(*(self._kept[group] for group in sorted(self._kept)), strict=True)
            index, scores, *codes, images = (torch.cat(tensors)[place] for tensors in parts)
        return RejectionSamples(images, tuple(codes), labels, scores, index, self.drawn, seed)


@torch.no_grad()
def class_scores(classifier: nn.Module, images: Tensor, label: Tensor | None, num_classes: int | None) -> Tensor:
    """A classifier's probability of each image's label, or of its likeliest class without labels: float64 [B].

    Raises:
        ArgumentError: the classifier knows another number of classes than the priors.
    """
    parameter = next(classifier.parameters(), None)
    device = images.device if parameter is None else parameter.device
    logits = require_tensor("classifier's result", in_evaluation(classifier)(images.to(device)))
    require_shape("classifier's result", logits, [images.shape[0], num_classes])
    probabilities = logits.double().cpu().softmax(1)
    if label is None:
        return probabilities.amax(1)
    return probabilities.gather(1, label.cpu().long()[:, None])[:, 0]


class CurvePoint(NamedTuple):
    """Scores of the samples that are left when a fraction is kept.

    Attributes:
        keep: fraction of each class kept.
        samples: how many of those are left entered the scores; the same at every point, because all of these scores
            also depend on the number of samples.
        least_score: the lowest classifier score among those left.
        precision, recall, density, coverage: see :class:`ManifoldScores`.
        frechet: None with no more samples than features.
    """

    keep: float
    samples: int
    least_score: float
    precision: float
    recall: float
    density: float
    coverage: float
    frechet: float | None


def rejection_curve(
    samples: DrawnSamples,
    classifier: nn.Module,
    extractor: FeatureExtractor,
    real: FeatureStatistics,
    fractions: Sequence[float],
    *,
    neighbours: int = 3,
    batch_size: int = 64,
    progress: bool = False,
) -> list[CurvePoint]:
    """Scores against the real images as a falling fraction of the samples, those best recognised, is kept.

    Each sample is decoded once; features go to a temporary file.

    Args:
        samples: all of them.
        classifier: logits [B, num_classes] of images [B, C, H, W] in [-1, 1].
        extractor: features of the scores.
        real: statistics of the real images' features.
        fractions: to keep of each class, in (0, 1].
        neighbours: k of precision, recall, density and coverage.

    Raises:
        ArgumentError: fractions outside (0, 1], or so few samples that the smallest leaves too few for k neighbours.
    """
    if not fractions:
        raise ArgumentError("fractions: expected at least one, got none")
    for fraction in fractions:
        _check_choice(fraction, None)
    groups = torch.zeros(len(samples), dtype=torch.int64) if samples.labels is None else samples.labels
    left = {fraction: _left_counts(groups, fraction) for fraction in fractions}
    count = min(real.keep, *(int(counts.sum()) for counts in left.values()))
    if count <= neighbours:
        raise ArgumentError(
            f"fractions: {min(fractions)} of {len(samples)} samples leaves {count}, expected more than {neighbours}"
        )
    scores = torch.empty(len(samples), dtype=torch.float64)
    size = (len(samples), real.gaussian.num_features)
    every = np.arange(len(samples))
    words = random_words(real.seed, 1, DOMAIN_KEPT, 0, len(samples))[:, 0]
    points = []
    done = 0
    with tempfile.TemporaryDirectory(prefix="fastvq-curve-") as folder:
        vectors = new_array(Path(folder) / "features.npy", size, np.float32)
        for images in image_batches(samples, every, batch_size, "scores of samples", progress=progress):
            rows = slice(done, done + len(images))
            label = None if samples.labels is None else samples.labels[rows]
            scores[rows] = class_scores(classifier, images, label, samples.num_classes)
            vectors[rows] = extractor.extract(images).vectors.cpu().float().numpy()
            done += len(images)
        for fraction in fractions:
            kept = _best(scores, groups, left[fraction])
            chosen = np.sort(kept[np.argsort(words[kept], kind="stable")[:count]])
            part = torch.from_numpy(np.asarray(vectors[chosen]))
            gaussian = GaussianStatistics(size[1])
            gaussian.update(part)
            manifold = manifold_scores(real.vectors, part, neighbours=neighbours)
            enough = min(count, real.count) > size[1]
            frechet = frechet_distance(real.gaussian, gaussian) if enough else None
            points.append(CurvePoint(fraction, count, float(scores[kept].min()), *manifold, frechet))
    return points


def _left_counts(groups: Tensor, fraction: float) -> Tensor:
    """Samples of each group that are left, at least one of each that has any."""
    return (torch.bincount(groups) * fraction - 1e-9).ceil().long()


def _best(scores: Tensor, groups: Tensor, counts: Tensor) -> np.ndarray:
    """Indices of the best samples of each group, as many as ``counts`` says."""
    chosen = []
    for group, count in enumerate(counts.tolist()):
        rows = (groups == group).nonzero()[:, 0]
        chosen.append(rows[scores[rows].argsort(descending=True, stable=True)[:count]])
    return torch.cat(chosen).numpy()
