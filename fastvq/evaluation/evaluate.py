"""The whole evaluation of a pipeline in one call."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastvq._check import require_choice, require_positive_int, wrapped_seed
from fastvq._nvtx import annotate
from fastvq.data.augment import Augment
from fastvq.data.base import ImageDataset, load_images
from fastvq.errors import ArgumentError
from fastvq.evaluation.accuracy import classification_accuracy
from fastvq.evaluation.features import FeatureExtractor, as_extractor
from fastvq.evaluation.likelihood import ImageMetrics, check_images, measure_images
from fastvq.evaluation.neighbours import nearest_neighbours
from fastvq.evaluation.rejection import CurvePoint, class_scores, rejection_curve
from fastvq.evaluation.sources import DrawnSamples, Reconstructions, draw_samples, labels_by_frequency, once_if_same
from fastvq.evaluation.statistics import (
    KEPT_VECTORS,
    FeatureStatistics,
    SetScores,
    compare,
    dataset_statistics,
    gather,
    image_batches,
)
from fastvq.models.classifier import ClassifierConfig
from fastvq.ops.draw import check_options
from fastvq.sampling import Pipeline
from fastvq.training import TrainConfig

T = TypeVar("T")
ClassesBy = Literal["turn", "frequency"]
CLASSES_BY: tuple[ClassesBy, ...] = ("turn", "frequency")

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_PICTURED = 16
_PICTURED_CLASSES = 10
_QUERIES = 10
_NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and how.

    Args:
        samples: number of samples for the metrics.
        temperature: of the draws, one for all levels or one for each, top first.
        neighbours: k of precision, recall, density and coverage.
        keep: feature vectors of each set that enter metrics of neighbours and kernels.
        fractions: of the rejection curve.
        seed: of the samples and of every random selection, any integer, taken modulo 2**64.
        batch_size: images at a time.
        classes_by: how samples get their classes: all in ``turn``, or each by its ``frequency`` in the training images
            (:func:`labels_by_frequency`), so that scores against images of unequal classes compare the same mixture.
    """

    samples: int = 10_000
    temperature: tuple[float, ...] = (1.0,)
    neighbours: int = 3
    keep: int = KEPT_VECTORS
    fractions: tuple[float, ...] = FRACTIONS
    seed: int = 0
    batch_size: int = 64
    classes_by: ClassesBy = "turn"

    def __post_init__(self) -> None:
        for name in ("samples", "neighbours", "keep", "batch_size"):
            require_positive_int(name, getattr(self, name))
        object.__setattr__(self, "seed", wrapped_seed("seed", self.seed))
        require_choice("classes_by", self.classes_by, CLASSES_BY)
        if not self.temperature:
            raise ArgumentError("temperature: expected one value, or one per level, got none")
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ArgumentError(f"fractions: expected numbers in (0, 1], got {self.fractions}")


class AccuracyPlan(NamedTuple):
    """How the classifiers of the classification accuracy score learn.

    Attributes:
        model: their architecture.
        training: steps, batch, learning rate and so on.
        augment: changes of the images that they see; None: none.
    """

    model: ClassifierConfig
    training: TrainConfig
    augment: Augment | None = None


class Duration(NamedTuple):
    """Seconds of wall-clock time, and of processor time of all threads."""

    wall: float
    processor: float


class Memorisation(NamedTuple):
    """How near images lie to their nearest training image in feature space: median and 1st percentile."""

    median: float
    lowest_percent: float


class Pictures(NamedTuple):
    """Images [N, C, H, W] in [-1, 1] of the report.

    Attributes:
        originals, reconstructions: held-out images and what their codes keep.
        samples: ``classes`` in turn, of many the first or the most frequent.
        classes: number of classes shown.
        queries, neighbours: samples, and the training images nearest to them, [queries, neighbours, C, H, W].
    """

    originals: Tensor
    reconstructions: Tensor
    samples: Tensor
    classes: int
    queries: Tensor | None
    neighbours: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`; parts that were not asked for are None.

    Attributes:
        config: what was asked for.
        images: codes, likelihood and reconstruction on ``training`` and ``validation`` images.
        extractor: title, digest and size of the features behind ``sets``, ``memorisation`` and ``curve``.
        sets: each set of images against the training images.
        memorisation: of ``samples`` and ``validation`` images.
        classifier: title of the classifier that rejects.
        curve: scores by fraction kept.
        accuracy: of classifiers trained on samples, reconstructions and real images, on validation images.
        draws: settings that the samples were drawn with, beside the seed; with classes ``classes by`` as well.
        pictures: images for the report.
        seconds: what each part took.
    """

    config: EvaluationConfig
    images: dict[str, ImageMetrics]
    extractor: dict[str, str | int | bool] | None
    sets: dict[str, SetScores] | None
    memorisation: dict[str, Memorisation] | None
    classifier: str | None
    curve: list[CurvePoint] | None
    accuracy: dict[str, dict[str, float]] | None
    draws: dict[str, Any]
    pictures: Pictures
    seconds: dict[str, Duration]


def check_evaluation(
    pipeline: Pipeline, config: EvaluationConfig, *, extractor: bool, classifier: bool, accuracy: bool
) -> None:
    """What of an evaluation does not depend on the images must fit together.

    Args:
        extractor, classifier, accuracy: whether there is one, as of :func:`evaluate`.

    Raises:
        ArgumentError: it does not.
    """
    if classifier and not extractor:
        raise ArgumentError("extractor: the rejection curve needs features; pass an extractor beside the classifier")
    least = math.ceil(min(config.fractions) * config.samples - 1e-9)
    if classifier and least <= config.neighbours:
        raise ArgumentError(
            f"fractions: {min(config.fractions)} of {config.samples} samples leaves {least}, expected more than "
            f"{config.neighbours} (neighbours)"
        )
    levels = len(pipeline.priors)
    if len(config.temperature) not in (1, levels):
        raise ArgumentError(f"temperature: expected one value or {levels}, got {len(config.temperature)}")
    if accuracy and pipeline.num_classes is None:
        raise ArgumentError("accuracy: the priors are unconditional, so their samples have no labels to learn from")
    if config.classes_by == "frequency" and pipeline.num_classes is None:
        raise ArgumentError("classes_by: expected 'turn' of priors without classes, got 'frequency'")
    for temperature in config.temperature:
        for prior in pipeline.priors:
            check_options(prior.config.num_codes, temperature, None, None)


@annotate("evaluate")
def evaluate(
    pipeline: Pipeline,
    dataset: ImageDataset,
    training: np.ndarray,
    validation: np.ndarray,
    config: EvaluationConfig | None = None,
    *,
    extractor: FeatureExtractor | nn.Module | None = None,
    classifier: nn.Module | None = None,
    accuracy: AccuracyPlan | None = None,
    samples: DrawnSamples | None = None,
    statistics: FeatureStatistics | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Likelihood, reconstruction, codebooks; with an extractor sample metrics; with a classifier the rejection curve.

    Args:
        pipeline: what is measured.
        dataset: real images of its channels, size and classes.
        training, validation: indices of the images, int; those held out must have had no part in training.
        config: what is measured, and how; by default :class:`EvaluationConfig` as it is.
        extractor: features for the sample metrics.
        classifier: logits of the priors' classes, for rejection. Best another network than the extractor's: scores
            are flattered where both are one.
        accuracy: how the classifiers of the classification accuracy score learn; None leaves it out.
        samples: in place of new ones, such as those of :func:`samples_from_shards`; their number, seed and temperature
            must be those of ``config``.
        statistics: of the features of ``samples``, such as those of :func:`statistics_from_shards`; by default they are
            gathered from the samples.
        cache: folder for the features' statistics of the training images.

    Raises:
        ArgumentError: parts that do not fit each other, before any work.
    """
    config = config or EvaluationConfig()
    check_evaluation(
        pipeline,
        config,
        extractor=extractor is not None,
        classifier=classifier is not None,
        accuracy=accuracy is not None,
    )
    check_images(pipeline, dataset)
    if len(training) == 0 or len(validation) == 0:
        raise ArgumentError(f"training and validation: expected images in both, got {len(training)}, {len(validation)}")
    features = None if extractor is None else as_extractor(extractor)
    if features is not None and features.num_channels not in (None, dataset.channels):
        raise ArgumentError(f"extractor: takes {features.num_channels} channel(s), the images have {dataset.channels}")
    blank = torch.zeros(1, dataset.channels, *dataset.size, dtype=torch.float32)
    if features is not None:
        features.extract(blank)
    labels = None
    if pipeline.num_classes is not None:
        assert dataset.labels is not None
        labels = dataset.labels[torch.from_numpy(np.asarray(training))]
        if features is not None and config.classes_by == "turn":
            _warn_of_unequal_classes(labels, pipeline.num_classes)
    _check_given(pipeline, config, labels, samples, statistics, features)
    if classifier is not None:
        class_scores(classifier, blank.to(pipeline.device), None, pipeline.num_classes)
    clock = _Clock()
    size = config.batch_size
    images = {
        name: clock(
            f"{name} images",
            functools.partial(measure_images, pipeline, dataset, rows, batch_size=size, progress=progress),
        )
        for name, rows in (("training", training), ("validation", validation))
    }
    temperature = config.temperature[0] if len(config.temperature) == 1 else list(config.temperature)
    settings = {"temperature": temperature, **(samples.settings if samples is not None else {})}
    with tempfile.TemporaryDirectory(prefix="fastvq-evaluation-") as folder:
        root = Path(folder)

        def draw(n: int, name: str, label: Tensor | None = None, seed: int = config.seed) -> DrawnSamples:
            return draw_samples(pipeline, n, root / name, label=label, seed=seed, progress=progress, **settings)

        if samples is None:
            wanted = config.samples if features is not None else _PICTURED_CLASSES * (pipeline.num_classes or 10)
            samples = clock("sampling", lambda: draw(wanted, "samples", _classes(pipeline, config, labels, wanted)))
        sets = memorisation = curve = real = None
        if features is not None:
            parts = (pipeline, dataset, training, validation, samples, statistics, features, config, cache, progress)
            real, found = clock("features", lambda: _statistics(*parts))
            sets = clock(
                "scores",
                lambda: {
                    name: compare(real, fake, neighbours=config.neighbours, seed=config.seed)
                    for name, fake in found.items()
                },
            )
            memorisation = {
                name: _memorisation(found[name].vectors, real.vectors) for name in ("samples", "validation images")
            }
        if classifier is not None and features is not None and real is not None:
            curve = clock(
                "rejection curve",
                lambda: rejection_curve(
                    samples,
                    classifier,
                    features,
                    real,
                    config.fractions,
                    neighbours=config.neighbours,
                    batch_size=size,
                    progress=progress,
                ),
            )
        scores = None
        if accuracy is not None:
            # Other draws than those of the metrics, and of just the classes that the real images have.
            taught = clock("sampling for accuracy", lambda: draw(len(training), "taught", labels, config.seed + 1))
            scores = clock(
                "accuracy",
                lambda: classification_accuracy(
                    {
                        "samples": (taught, np.arange(len(taught))),
                        "reconstructions": (Reconstructions(pipeline.vqvae, dataset), training),
                        "real images": (dataset, training),
                    },
                    (dataset, validation),
                    accuracy.model,
                    accuracy.training,
                    root / "accuracy",
                    augment=accuracy.augment,
                    progress=progress,
                ),
            )
        in_turn = config.classes_by == "turn"
        pictures = _pictures(pipeline, dataset, training, validation, samples, features, real, in_turn)
    return Evaluation(
        config=config,
        images=images,
        extractor=None
        if features is None
        else {
            "title": features.title,
            "digest": features.digest,
            "features": features.num_features,
            "is_inception": features.is_inception,
        },
        sets=sets,
        memorisation=memorisation,
        classifier=None if classifier is None else as_extractor(classifier).title,
        curve=curve,
        accuracy=scores,
        draws=samples.settings if labels is None else {**samples.settings, "classes by": config.classes_by},
        pictures=pictures,
        seconds=clock.seconds,
    )


def _check_given(
    pipeline: Pipeline,
    config: EvaluationConfig,
    labels: Tensor | None,
    samples: DrawnSamples | None,
    statistics: FeatureStatistics | None,
    extractor: FeatureExtractor | None,
) -> None:
    """Whether samples, and statistics of them, are those that the configuration describes."""
    if samples is None:
        if statistics is not None:
            raise ArgumentError("statistics: expected the samples that they are of beside them")
        return
    for name, there, asked in (
        ("samples", len(samples), config.samples),
        ("seed", samples.seed, config.seed),
        ("temperature", samples.temperature, once_if_same(config.temperature)),
    ):
        if there != asked:
            raise ArgumentError(f"{name}: the samples given have {there}, expected {asked}")
    wanted = _classes(pipeline, config, labels, len(samples))
    if wanted is not None and (samples.labels is None or not torch.equal(samples.labels, wanted)):
        in_turn = config.classes_by == "turn"
        how = "all classes in turn, since images of all" if in_turn else "labels_by_frequency, since images of these"
        raise ArgumentError(f"label: expected samples of {how} are compared with them")
    if statistics is None:
        return
    if extractor is None:
        raise ArgumentError("statistics: expected the extractor that their features are of beside them")
    for name, there, asked in (
        ("vectors", statistics.count, len(samples)),
        ("features", statistics.gaussian.num_features, extractor.num_features),
        ("keep", statistics.keep, config.keep),
        ("seed", statistics.seed, config.seed),
    ):
        if there != asked:
            raise ArgumentError(f"statistics: expected {name} {asked}, got {there}")


def _classes(pipeline: Pipeline, config: EvaluationConfig, labels: Tensor | None, n: int) -> Tensor | None:
    """Classes of n samples, [n], where the training images have ``labels``; None without classes."""
    if labels is None or config.classes_by == "turn":
        return pipeline.labels(range(n))
    return labels_by_frequency(labels, range(n))


def _warn_of_unequal_classes(labels: Tensor, classes: int) -> None:
    counts = torch.bincount(labels, minlength=classes)
    least, most = int(counts.min()), int(counts.max())
    if most > 2 * least:
        warnings.warn(
            f"classes_by: samples are of all classes in turn, but the training images have from {least} to {most} of a "
            "class, so that scores against them also tell this difference; 'frequency' draws classes as often as they "
            "have them",
            stacklevel=3,
        )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, Duration] = {}

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        wall, processor = time.perf_counter(), time.process_time()
        with annotate(name):
            result = work()
        self.seconds[name] = Duration(time.perf_counter() - wall, time.process_time() - processor)
        return result


def _statistics(
    pipeline: Pipeline,
    dataset: ImageDataset,
    training: np.ndarray,
    validation: np.ndarray,
    samples: DrawnSamples,
    statistics: FeatureStatistics | None,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    cache: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[FeatureStatistics, dict[str, FeatureStatistics]]:
    """Of the training images, and of the sets that are compared with them."""
    real = dataset_statistics(
        dataset,
        training,
        extractor,
        keep=config.keep,
        seed=config.seed,
        batch_size=config.batch_size,
        cache=cache,
        progress=progress,
    )
    reconstructions = Reconstructions(pipeline.vqvae, dataset)
    sources: dict[str, tuple[ImageDataset, np.ndarray]] = {
        "samples": (samples, np.arange(len(samples))),
        "reconstructed training images": (reconstructions, training),
        "reconstructed validation images": (reconstructions, validation),
        "validation images": (dataset, validation),
    }
    found = {} if statistics is None else {"samples": statistics}
    for name, (images, rows) in sources.items():
        if name in found:
            continue
        batches = image_batches(images, rows, config.batch_size, f"features of {name}", progress=progress)
        found[name] = gather(batches, extractor, keep=config.keep, seed=config.seed)
    return real, found


def _memorisation(vectors: Tensor, training: Tensor) -> Memorisation:
    distances = nearest_neighbours(vectors, training)[0][:, 0]
    return Memorisation(float(distances.median()), float(distances.quantile(0.01)))


def _pictured(samples: DrawnSamples, num_classes: int | None, in_turn: bool) -> tuple[np.ndarray, int]:
    """Samples to show, row by row, and how many classes are beside each other in a row."""
    classes = min(_PICTURED_CLASSES, num_classes or 10)
    if in_turn or samples.labels is None:
        # Of many classes the first are shown.
        step = num_classes or classes
        rows = np.array([row * step + column for row in range(10) for column in range(classes)])
        return rows[rows < len(samples)], classes
    counts = torch.bincount(samples.labels)
    most = counts.argsort(descending=True, stable=True)[:classes]
    shown = most[counts[most] > 0].sort().values
    depth = min(10, int(counts[shown].min()))
    columns = [(samples.labels == one).nonzero()[:depth, 0] for one in shown]
    return torch.stack(columns, 1).flatten().numpy(), len(shown)


def _pictures(
    pipeline: Pipeline,
    dataset: ImageDataset,
    training: np.ndarray,
    validation: np.ndarray,
    samples: DrawnSamples,
    extractor: FeatureExtractor | None,
    real: FeatureStatistics | None,
    in_turn: bool,
) -> Pictures:
    shown = validation[:_PICTURED]
    rows, classes = _pictured(samples, pipeline.num_classes, in_turn)
    drawn = samples.batch(rows)
    queries = neighbours = None
    if extractor is not None and real is not None:
        queries = drawn[:_QUERIES]
        count = min(_NEIGHBOURS, len(real.vectors))
        _, nearest = nearest_neighbours(extractor.extract(queries).vectors.cpu(), real.vectors, count=count)
        found = training[real.numbers[nearest].flatten().numpy()]
        neighbours = load_images(dataset, found).unflatten(0, (len(queries), count))
    return Pictures(
        originals=load_images(dataset, shown),
        reconstructions=Reconstructions(pipeline.vqvae, dataset).batch(shown),
        samples=drawn,
        classes=classes,
        queries=queries,
        neighbours=neighbours,
    )
