"""Likelihood by enumeration, samples on disk, rejection sampling and its curve, classification accuracy."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import (
    Flatten,
    Images,
    Points,
    Ripples,
    all_grids,
    gaussian,
    readable_pipeline,
)
from helpers import refuses
from PIL import Image
from torch import Tensor, nn
from training_helpers import train_config

from fastvq import Pipeline
from fastvq.data import psnr
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.evaluation import (
    CurvePoint,
    DrawnSamples,
    EvaluationConfig,
    FeatureExtractor,
    Reconstructions,
    classification_accuracy,
    draw_samples,
    evaluate,
    gather,
    measure_images,
    rejection,
    rejection_curve,
    sample_with_rejection,
    sources,
)
from fastvq.evaluation.curves import draw_curve
from fastvq.evaluation.tables import _trend
from fastvq.models.classifier import Classifier, ClassifierConfig
from fastvq.training.classifier import accuracies, train_classifier

# The package's name for it is the function.
evaluate_module = sys.modules["fastvq.evaluation.evaluate"]
GRIDS = 3**5


@pytest.mark.parametrize("num_classes", [None, 2], ids=["unconditional", "classes"])
def test_probabilities_of_all_grids_add_up_to_one(num_classes: int | None) -> None:
    pipeline = readable_pipeline(num_classes)
    for label in range(num_classes or 1):
        labels = None if num_classes is None else torch.full((GRIDS,), label)
        images = Images(all_grids(), labels)
        images.num_classes = num_classes
        lengths = [measure_images(pipeline, images, np.array([i])).bits_per_image for i in range(GRIDS)]
        probabilities = 2.0 ** -np.array(lengths)
        assert probabilities.sum() == pytest.approx(1, abs=1e-6)
        assert probabilities.max() > 3 / GRIDS
        # A set's length is the mean over its images.
        whole = measure_images(pipeline, images, np.arange(GRIDS), batch_size=50)
        assert whole.bits_per_image == pytest.approx(np.mean(lengths), rel=1e-6)


def test_each_figure_by_hand() -> None:
    pipeline, data = readable_pipeline(), Images(all_grids())
    rows = np.array([7, 100, 30, 201, 5])
    found = measure_images(pipeline, data, rows, batch_size=2)
    images = data.pixels[torch.from_numpy(rows)]
    codes = pipeline.vqvae.encode(images)
    with torch.no_grad():
        nats = [p.nll(c, codes[:level] or None).double() for level, (p, c) in enumerate(zip(pipeline.priors, codes))]  # noqa: B905
        mse = float((pipeline.vqvae.decode(codes) - images).square().mean())
    for level, (metrics, values) in enumerate(zip(found.levels, nats, strict=True)):
        assert metrics.nll == pytest.approx(float(values.mean()), rel=1e-6)
        assert metrics.bits == pytest.approx(metrics.nll / math.log(2))
        per_image = values.mean((1, 2)) / math.log(2)
        assert metrics.error == pytest.approx(float(per_image.std()) / math.sqrt(5), rel=1e-5)
        share = np.bincount(codes[level].flatten().numpy(), minlength=3) / codes[level].numel()
        assert metrics.usage == pytest.approx(np.mean(share > 0))
        assert metrics.perplexity == pytest.approx(math.exp(-sum(s * math.log(s) for s in share if s)))
        assert metrics.uniform_bits == pytest.approx(math.log2(3))
    bits = found.levels[0].bits + 4 * found.levels[1].bits
    assert found.bits_per_image == pytest.approx(bits)
    assert found.bits_per_dimension == pytest.approx(bits / 16)
    assert found.code_compression == pytest.approx(8 * 16 / (5 * math.log2(3)))
    assert found.prior_compression == pytest.approx(8 * 16 / bits)
    assert found.mse == pytest.approx(mse, rel=1e-5)
    assert found.psnr == pytest.approx(psnr(mse), rel=1e-5)
    assert found.images == 5


def test_models_keep_their_mode() -> None:
    pipeline, data = readable_pipeline(), Images(all_grids())
    pipeline.vqvae.train()
    pipeline.priors[1].train()
    embedding = pipeline.vqvae.quantizers[0].embedding.clone()  # type: ignore[operator]
    measure_images(pipeline, data, np.arange(3))
    Reconstructions(pipeline.vqvae, data).batch(np.arange(3))
    assert pipeline.vqvae.training
    assert pipeline.priors[1].training
    assert not pipeline.priors[0].training
    assert torch.equal(pipeline.vqvae.quantizers[0].embedding, embedding)  # type: ignore[arg-type]


LABELS = torch.arange(GRIDS) % 2


@pytest.mark.parametrize(
    ("classes", "data", "message"),
    [
        (None, Images(torch.zeros(2, 3, 4, 4)), r"dataset: has 3 channel\(s\), the model takes 1"),
        (None, Images(torch.zeros(2, 1, 8, 4)), "dataset: expected images of 4 x 4, got 8 x 4"),
        (2, Images(all_grids()), "dataset: the priors expect 2 classes, got no labels"),
        (3, Images(all_grids(), LABELS), "dataset: the priors expect 3 classes, got 2 classes"),
    ],
    ids=["channels", "size", "no-labels", "classes"],
)
def test_data_that_do_not_fit(classes: int | None, data: Images, message: str) -> None:
    pipeline = readable_pipeline(classes)
    with refuses(ArgumentError, message):
        measure_images(pipeline, data, np.arange(2))
    with refuses(ArgumentError, message):
        evaluate(pipeline, data, np.arange(1), np.arange(1))


def test_samples_on_disk_are_those_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = readable_pipeline(2)
    expected = pipeline.sample(21, label=torch.arange(21) % 2, seed=5, temperature=0.8)
    monkeypatch.setattr(sources, "_CHUNK", 8)
    samples = draw_samples(pipeline, 21, tmp_path / "a", seed=5, temperature=0.8)
    assert samples.labels is not None
    assert samples.labels.tolist() == [i % 2 for i in range(21)]
    rows = np.array([20, 3, 3, 0])
    for codes, level in zip(samples.codes(rows), expected.codes, strict=True):
        assert torch.equal(codes, level[torch.from_numpy(rows)])
    torch.testing.assert_close(samples.batch(rows), expected.images[torch.from_numpy(rows)])
    torch.testing.assert_close(samples.image(3), expected.images[3])
    again, other = (draw_samples(pipeline, 21, tmp_path / str(seed), seed=seed, temperature=0.8) for seed in (5, 6))
    assert samples.fingerprint() == again.fingerprint()
    assert samples.fingerprint() != other.fingerprint()


def candidates(pipeline: Pipeline, labels: Tensor, classifier: nn.Module, seed: int) -> tuple[Any, Tensor]:
    drawn = pipeline.sample(len(labels), label=labels, seed=seed)
    with torch.no_grad():
        probabilities = classifier(drawn.images).double().softmax(1)
    return drawn, probabilities.gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.3])
def test_the_best_of_each_class_are_kept(keep: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "_CHUNK", chunk)
    pipeline, classifier = readable_pipeline(2), Ripples(2)
    label = torch.tensor([1, 0, 0, 1, 0, 0, 1])
    found = sample_with_rejection(pipeline, 7, classifier, keep=keep, label=label, seed=3)
    counts = [math.ceil(4 / keep), math.ceil(3 / keep)]
    assert found.drawn == sum(counts)
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    drawn, scores = candidates(pipeline, labels, classifier, 3)
    for group in (0, 1):
        rows = (labels == group).nonzero()[:, 0].tolist()
        best = sorted(sorted(rows, key=lambda row: (-float(scores[row]), row))[: int((label == group).sum())])
        assert found.indices[label == group].tolist() == best
    torch.testing.assert_close(found.images, drawn.images[found.indices])
    torch.testing.assert_close(found.scores, scores[found.indices], rtol=1e-5, atol=1e-9)
    for kept, level in zip(found.codes, drawn.codes, strict=True):
        assert torch.equal(kept, level[found.indices])
    assert found.labels is not None
    assert torch.equal(found.labels, label)


def test_keeping_all_is_sampling() -> None:
    pipeline = readable_pipeline(2)
    found = sample_with_rejection(pipeline, 6, Ripples(2), keep=1, label=1, seed=9)
    expected = pipeline.sample(6, label=1, seed=9)
    assert found.indices.tolist() == list(range(6))
    torch.testing.assert_close(found.images, expected.images)


@pytest.mark.parametrize("classes", [None, 2], ids=["unconditional", "classes"])
def test_a_threshold_holds_for_all_and_gives_the_first(classes: int | None) -> None:
    pipeline, classifier = readable_pipeline(classes), Ripples(classes or 3)
    first = sample_with_rejection(pipeline, 9, classifier, threshold=0.55, seed=1)
    again = sample_with_rejection(pipeline, 9, classifier, threshold=0.55, seed=1)
    assert len(first.images) == 9
    assert bool((first.scores >= 0.55).all())
    assert first.drawn > 9
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.images, again.images)
    assert len(set(first.indices.tolist())) == 9
    if classes is not None:
        assert first.labels is not None
        for group in range(classes):
            rows = first.indices[first.labels == group].tolist()
            assert rows == sorted(rows)
    other = sample_with_rejection(pipeline, 9, classifier, threshold=0.55, seed=2)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ArgumentError, "keep and threshold: expected exactly one of them, got None and None"),
        ({"keep": 0.5, "threshold": 0.5}, ArgumentError, "keep and threshold: expected exactly one of them, got 0.5"),
        ({"keep": 0}, ArgumentError, r"keep: must lie in \(0, 1\], got 0"),
        ({"keep": 1.5}, ArgumentError, r"keep: must lie in \(0, 1\], got 1.5"),
        ({"keep": "half"}, ArgumentTypeError, "keep: expected a number, got str"),
        ({"threshold": 1}, ArgumentError, r"threshold: must lie in \[0, 1\), got 1"),
        ({"threshold": 1 - 1e-9}, ArgumentError, "threshold: after .* candidates too few reach"),
        ({"keep": 0.5, "label": 2}, ArgumentError, "label: must lie in 0..1, got 2"),
        ({"keep": 0.5, "label": torch.tensor([0, 2])}, ArgumentError, "label: must lie in 0..1, got 2"),
        ({"keep": 0.5, "label": "cat"}, ArgumentError, "label: expected one of the names .none.; got 'cat'"),
        ({"keep": 0.5, "seed": 0.5}, ArgumentTypeError, "seed: expected an int, a torch.Generator or None"),
        ({"keep": 0.5, "classifier": Ripples(3)}, ArgumentError, r"classifier's result: expected shape \[1, 2\]"),
    ],
    ids=str,
)
def test_rejection_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"classifier": Ripples(2), **options}
    with refuses(error, message):
        sample_with_rejection(readable_pipeline(2), 4, options.pop("classifier"), **options)


def test_rejection_of_no_samples_or_unknown_classes() -> None:
    with refuses(ArgumentError, "n: must be at least 1"):
        sample_with_rejection(readable_pipeline(2), 0, Ripples(2), keep=0.5)
    with refuses(ArgumentError, "label: these priors are not class-conditional, got 1"):
        sample_with_rejection(readable_pipeline(), 2, Ripples(2), keep=0.5, label=1)


class Central(nn.Module):
    """Surer of class 0 the nearer a point lies to the origin."""

    def forward(self, images: Tensor) -> Tensor:
        radius = images.flatten(1).square().sum(1)
        return torch.stack([-radius, torch.zeros_like(radius)], 1)


def test_rejection_trades_recall_for_precision() -> None:
    real = gather([gaussian(500, 2, scale=0.2)[:, None, None]], FeatureExtractor(nn.Flatten()))
    # Samples spread wider than the real points; what the classifier likes lies at the centre.
    points = Points(gaussian(4000, 2, seed=1, scale=0.5).clamp(-1, 1))
    fractions = (1.0, 0.8, 0.6, 0.4, 0.1)
    extractor = FeatureExtractor(nn.Flatten())
    # Ten neighbours leave no holes in the middle of the real points, where a sample would fall out by chance.
    curve = rejection_curve(points, Central(), extractor, real, fractions, neighbours=10)  # type: ignore[arg-type]
    assert [point.keep for point in curve] == list(fractions)
    assert {point.samples for point in curve} == {400}
    precision, recall = [point.precision for point in curve], [point.recall for point in curve]
    assert precision == sorted(precision)
    assert precision[-1] - precision[0] > 0.1
    assert recall == sorted(recall, reverse=True)
    assert recall[0] - recall[-1] > 0.3
    least = [point.least_score for point in curve]
    assert least == sorted(least)
    frechet = [point.frechet for point in curve if point.frechet is not None]
    # Too wide without rejection, too narrow at the end: the best lies between.
    assert min(frechet[1:-1]) < min(frechet[0], frechet[-1])
    options = {"neighbours": 10, "batch_size": 999}
    assert rejection_curve(points, Central(), extractor, real, fractions, **options) == curve  # type: ignore[arg-type]


def test_curves_need_enough_samples() -> None:
    extractor = FeatureExtractor(nn.Flatten())
    real = gather([gaussian(50, 2)[:, None, None]], extractor)
    points: Any = Points(gaussian(20, 2))
    with refuses(ArgumentError, "fractions: 0.1 of 20 samples leaves 2, expected more than 3"):
        rejection_curve(points, Central(), extractor, real, (1.0, 0.1))
    with refuses(ArgumentError, "fractions: expected at least one"):
        rejection_curve(points, Central(), extractor, real, ())
    with refuses(ArgumentError, r"keep: must lie in \(0, 1\], got 2"):
        rejection_curve(points, Central(), extractor, real, (2.0,))


def stripes(n: int, seed: int, *, wrong: float = 0.0) -> Images:
    """Horizontal (0) and vertical (1) stripes in noise; a share of them under the other's label."""
    labels = torch.arange(n) % 2
    pattern = torch.tensor([0.8, -0.8]).repeat(4)
    across, down = pattern[:, None].expand(8, 8), pattern[None].expand(8, 8)
    clean = torch.where(labels[:, None, None] == 0, across, down)
    pixels = (clean[:, None] + 0.3 * gaussian(n, 64, seed=seed).reshape(n, 1, 8, 8)).clamp(-1, 1)
    swapped = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < wrong
    return Images(pixels, torch.where(swapped, 1 - labels, labels), f"stripes-{seed}-{wrong}")


STRIPES = ClassifierConfig(in_channels=1, num_classes=2, channels=(4, 4), features=4)


def test_accuracy_falls_with_what_the_samples_teach(tmp_path: Path) -> None:
    rows = np.arange(64)
    test = stripes(40, 9)
    found = classification_accuracy(
        {
            "good samples": (stripes(64, 0), rows),
            "half wrong": (stripes(64, 1, wrong=0.5), rows),
            "all wrong": (stripes(64, 2, wrong=1.0), rows),
        },
        (test, np.arange(40)),
        STRIPES,
        train_config(steps=40, learning_rate=2e-2, batch_size=16, accumulate=1),
        tmp_path,
    )
    assert found["good samples"]["top1"] > 0.95
    assert found["all wrong"]["top1"] < 0.05
    assert found["all wrong"]["top1"] < found["half wrong"]["top1"] < found["good samples"]["top1"]
    assert set(found["good samples"]) == {"top1", "nll"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all-wrong", "good-samples", "half-wrong"]


@pytest.mark.parametrize(
    ("images", "rows", "message"),
    [
        (Images(torch.zeros(8, 1, 8, 8)), 8, "samples: expected"),
        (Images(torch.zeros(8, 3, 8, 8), torch.arange(8) % 2), 8, "samples: expected"),
        (Images(torch.zeros(8, 1, 8, 8), torch.arange(8) % 3), 8, "samples: expected"),
        (Images(torch.zeros(8, 1, 4, 4), torch.arange(8) % 2), 8, "samples: expected"),
        (stripes(8, 0), 0, "test: expected at least one image"),
    ],
    ids=["labels", "channels", "classes", "size", "no-test"],
)
def test_accuracy_refuses(images: Images, rows: int, message: str, tmp_path: Path) -> None:
    with refuses(ArgumentError, message):
        classification_accuracy(
            {"samples": (images, np.arange(8))}, (stripes(8, 1), np.arange(rows)), STRIPES, train_config(), tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_accuracies_by_hand() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    logits = gaussian(30, 7).reshape(30, 1, 1, 7)
    data = Images(logits, torch.arange(30) % 7)
    assert data.labels is not None
    order = logits.flatten(1).argsort(1, descending=True)
    found = accuracies(Fixed(), data, np.arange(30), batch_size=4)
    assert found["top1"] == pytest.approx(float((order[:, 0] == data.labels).float().mean()))
    assert found["top5"] == pytest.approx(float((order[:, :5] == data.labels[:, None]).any(1).float().mean()))
    expected = nn.functional.cross_entropy(logits.flatten(1), data.labels)
    assert found["nll"] == pytest.approx(float(expected), rel=1e-5)


def test_a_classifier_resumes_exactly(tmp_path: Path) -> None:
    data = stripes(40, 0)
    config = train_config(steps=8, checkpoint_every=3)
    whole = train_classifier(data, STRIPES, config, tmp_path / "whole")
    part = train_classifier(data, STRIPES, config, tmp_path / "part")
    for name in ("model", "checkpoints/step_00000008"):
        (folder := tmp_path / "part" / name).rename(tmp_path / folder.name)
    resumed = train_classifier(data, STRIPES, config, tmp_path / "part", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, part.state_dict()[key])
        assert torch.equal(value, resumed.state_dict()[key])
    logs = [(tmp_path / name / "logs" / "metrics.jsonl").read_text() for name in ("whole", "part")]
    assert logs[0] == logs[1]
    assert '"top1"' in logs[0]


def test_the_whole_evaluation_of_a_tiny_model(tmp_path: Path) -> None:
    pipeline = readable_pipeline(2)
    data = Images(all_grids(), torch.arange(GRIDS) % 2)
    torch.manual_seed(0)
    network = Classifier(ClassifierConfig(in_channels=1, num_classes=2, channels=(4,), features=3)).eval()
    config = EvaluationConfig(samples=60, fractions=(1.0, 0.5), batch_size=32)
    found = evaluate(
        pipeline,
        data,
        np.arange(200),
        np.arange(200, GRIDS),
        config,
        extractor=network,
        classifier=network,
        cache=tmp_path,
    )
    assert found.sets is not None
    assert list(found.sets) == [
        "samples",
        "reconstructed training images",
        "reconstructed validation images",
        "validation images",
    ]
    assert [scores.images for scores in found.sets.values()] == [60, 200, 43, 43]
    assert all(scores.frechet is not None and scores.manifold is not None for scores in found.sets.values())
    assert found.curve is not None
    assert [point.samples for point in found.curve] == [30, 30]
    assert found.classifier == found.extractor["title"]  # type: ignore[index]
    assert found.pictures.samples.shape == (20, 1, 4, 4)
    assert found.pictures.neighbours is not None
    assert found.pictures.neighbours.shape == (10, 3, 1, 4, 4)
    assert found.accuracy is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifier": Ripples(2)}, "extractor: the rejection curve needs features"),
        (
            {"extractor": Classifier(ClassifierConfig(in_channels=3, num_classes=2, channels=(4,)))},
            r"extractor: takes 3 channel\(s\), the images have 1",
        ),
        ({"extractor": Flatten(), "classifier": Ripples(5)}, r"classifier's result: expected shape \[1, 2\]"),
        ({"extractor": nn.Identity()}, "module's result: expected shape"),
        (
            {"extractor": Flatten(), "classifier": Ripples(2), "config": EvaluationConfig(samples=30)},
            "fractions: 0.1 of 30 samples leaves 3, expected more than 3",
        ),
        ({"config": EvaluationConfig(temperature=(1.0, 1.0, 1.0))}, "temperature: expected one value or 2, got 3"),
    ],
    ids=["no-features", "channels", "classes", "not-features", "too-few", "temperatures"],
)
def test_what_does_not_fit_is_found_before_any_work(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever measures anything would now fail in another way.
    monkeypatch.setattr(evaluate_module, "measure_images", None)
    monkeypatch.setattr(evaluate_module, "draw_samples", None)
    data = Images(all_grids(), LABELS)
    with refuses(ArgumentError, message):
        evaluate(readable_pipeline(2), data, np.arange(9), np.arange(9), progress=True, **options)


def test_drawn_samples_are_data(tmp_path: Path) -> None:
    samples = draw_samples(readable_pipeline(2), 5, tmp_path)
    assert isinstance(samples, DrawnSamples)
    assert (samples.size, samples.channels, samples.num_classes, samples.class_names) == ((4, 4), 1, 2, ("0", "1"))
    with refuses(ArgumentError, r"label: expected shape \[5\], got \[4\]"):
        draw_samples(readable_pipeline(2), 5, tmp_path / "b", label=torch.zeros(4).long())


def test_the_trend_of_a_curve_is_said_with_its_exceptions() -> None:
    values = [(0.5, 0.8, 0.6), (1.0, 0.7, 0.9), (0.2, 0.79, 0.3)]
    points = [CurvePoint(keep, 9, 0.0, precision, recall, 0.0, 0.0, None) for keep, precision, recall in values]
    assert _trend(points) == (
        "As less is kept, precision rises from 0.700 to 0.790 (1 of 2 steps against it, by at most 0.010) and "
        "recall falls from 0.900 to 0.300 (0 of 2 steps against it)."
    )


TRENDS: dict[str, tuple[list[float], str]] = {
    "rises": ([0.7, 0.8, 0.9], "rises from 0.700 to 0.900 (0 of 2 steps against it)"),
    "falls": ([0.9, 0.95, 0.6], "falls from 0.900 to 0.600 (1 of 2 steps against it, by at most 0.050)"),
    "back-again": ([1.0, 0.9, 1.0], "is 1.000 in the end as at first (between 0.900 and 1.000)"),
    "same": ([0.5, 0.5, 0.5], "is 0.500 in the end as at first"),
    "same-as-written": ([0.5, 0.5001, 0.50004], "is 0.500 in the end as at first"),
}


@pytest.mark.parametrize(("values", "expected"), TRENDS.values(), ids=TRENDS)
def test_the_trend_follows_the_numbers(values: list[float], expected: str) -> None:
    """Points may come in any order; the whole set of samples comes first in the sentence."""
    points = [CurvePoint(keep, 9, 0.0, v, 0.4, 0.0, 0.0, None) for keep, v in zip((1.0, 0.5, 0.1), values, strict=True)]
    assert _trend(points[::-1]) == f"As less is kept, precision {expected} and recall is 0.400 in the end as at first."
    swapped = [point._replace(precision=0.4, recall=point.precision) for point in points]
    assert _trend(swapped) == f"As less is kept, precision is 0.400 in the end as at first and recall {expected}."


@pytest.mark.parametrize(("distances", "panels"), [([None, None], 2), ([1.5, None], 3), ([1.5, 1.2], 3)])
def test_the_picture_has_no_empty_panels(distances: list[float | None], panels: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [CurvePoint(keep, 9, 0.0, 0.9, 0.4, 1.0, 0.8, d) for keep, d in zip((1.0, 0.5), distances, strict=True)]
    draw_curve(points, tmp_path / "curve.png", frechet_name="FID", features="some")
    assert Image.open(tmp_path / "curve.png").size == (300 * panels, 306)
