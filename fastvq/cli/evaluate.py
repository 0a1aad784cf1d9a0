"""``fastvq evaluate``: the figures of a trained model, and a report."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from fastvq._files import sweep
from fastvq._lock import locked
from fastvq._markdown import MarkdownPage
from fastvq.cli.classify import CLASSIFIER, load_classifier
from fastvq.cli.described import DescribedImages
from fastvq.cli.loading import advise, keep_images, remember
from fastvq.cli.project import Project, augmentation, choose_device, load_pipeline, require_folder_name
from fastvq.errors import ArgumentError, MissingFileError
from fastvq.evaluation import (
    AccuracyPlan,
    ClassifierFeatures,
    EvaluationConfig,
    FeatureExtractor,
    InceptionFeatures,
    check_report,
    samples_from_shards,
    score_shard,
    shard_settings,
    statistics_from_shards,
    write_report,
)
from fastvq.evaluation import evaluate as measure
from fastvq.evaluation.evaluate import check_evaluation
from fastvq.evaluation.sources import once_if_same
from fastvq.evaluation.tables import add_sections, to_dict
from fastvq.models.classifier import Classifier, ClassifierConfig
from fastvq.sampling import Pipeline, Shard
from fastvq.training import TrainConfig


def evaluate(arguments: argparse.Namespace) -> None:
    if (arguments.run is None) == (arguments.pretrained is None):
        raise ArgumentError("RUN: expected a project folder, or --pretrained NAME, and not both")
    if arguments.run is not None and not arguments.run.is_dir():
        raise MissingFileError(f"RUN: no folder {arguments.run}")
    device = choose_device(arguments.device)
    if arguments.shard is not None:
        _score(arguments, device)
        return
    if arguments.out is not None:
        require_folder_name(arguments.out)
        check_report(arguments.out, overwrite=arguments.overwrite, curves=arguments.curves)
    pipeline = load_pipeline(arguments.run, arguments.pretrained, device, arguments.weights)
    config = EvaluationConfig(
        **_drawn(arguments, pipeline),
        neighbours=arguments.neighbours,
        keep=arguments.vectors,
        fractions=tuple(arguments.keep),
        classes_by=arguments.classes_by,
        batch_size=arguments.batch_size,
    )
    extractor, classifier = _networks(arguments, device)
    check_evaluation(
        pipeline,
        config,
        extractor=extractor is not None,
        classifier=classifier is not None,
        accuracy=arguments.accuracy_steps != 0,
    )
    samples = statistics = None
    if arguments.from_shards is not None:
        samples = samples_from_shards(pipeline, arguments.from_shards)
        if extractor is not None:
            statistics = statistics_from_shards(
                pipeline, arguments.from_shards, extractor, keep=config.keep, batch_size=config.batch_size
            )
    project = None if arguments.run is None else Project(arguments.run)
    channels, *size = pipeline.image_shape
    images = DescribedImages(arguments, project, size=size, channels=channels)
    augment = augmentation(images.description)
    training_config = None
    if arguments.accuracy_steps:
        training_config = TrainConfig(
            steps=arguments.accuracy_steps,
            batch_size=64,
            learning_rate=2e-3,
            weight_decay=0.01,
            warmup_steps=min(50, arguments.accuracy_steps),
            ema_decay=0.99,
            seed=config.seed,
            image_every=None,
            checkpoint_every=None,
            device=device,
        )
    dataset, _, (training, validation) = images.open()
    remember(dataset)
    advise(dataset, "with --skip-broken --changed-data")
    if project is not None:
        keep_images(arguments, project, dataset)
    plan = None
    if training_config is not None:
        model = (
            classifier.config
            if isinstance(classifier, Classifier)
            else ClassifierConfig(in_channels=dataset.channels, num_classes=dataset.num_classes or 1)
        )
        plan = AccuracyPlan(model, training_config, augment)
    cache = arguments.cache
    if cache is None and project is not None and project.data.is_file():
        cache = project.path / "evaluation"
    with contextlib.nullcontext() if cache is None else _own_cache(cache):
        evaluation = measure(
            pipeline,
            dataset,
            training,
            validation,
            config,
            extractor=extractor,
            classifier=classifier,
            accuracy=plan,
            samples=samples,
            statistics=statistics,
            cache=cache,
            progress=not arguments.quiet,
        )
    document = MarkdownPage()
    add_sections(document, to_dict(evaluation))
    print(document.markdown())
    if extractor is None:
        print(
            "No sample metrics: they need features. `fastvq train-classifier` trains them, --inception FILE gives "
            "Inception's."
        )
    elif plan is None and pipeline.num_classes is not None:
        print("No classification accuracy score: --accuracy-steps says how long its classifiers learn.")
    if arguments.out is not None:
        name = arguments.pretrained or arguments.run.resolve().name
        write_report(
            evaluation,
            arguments.out,
            title=f"Evaluation of {name}",
            curves=arguments.curves,
            overwrite=arguments.overwrite,
        )
        print(f"report in {arguments.out}")


def _score(arguments: argparse.Namespace, device: str) -> None:
    """Gather the features of one part of the samples; no data set is needed."""
    shard = Shard.parse(arguments.shard)
    if arguments.from_shards is None:
        raise ArgumentError("--shard: names a part of the samples in a folder; pass the folder as --from-shards")
    if arguments.out is not None:
        raise ArgumentError("--out: the report is made of all parts, without --shard")
    pipeline = load_pipeline(arguments.run, arguments.pretrained, device, arguments.weights)
    _drawn(arguments, pipeline)
    extractor, _ = _networks(arguments, device)
    if extractor is None:
        raise ArgumentError("--shard: there are no features to gather; pass --features, --classifier or --inception")
    path = score_shard(
        pipeline,
        arguments.from_shards,
        extractor,
        shard,
        keep=arguments.vectors,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )
    print(f"features of part {path.stem} in {arguments.from_shards}")


def _drawn(arguments: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """Number, seed and temperature of the samples: of those to be drawn as typed, of those that are there theirs."""
    typed = {
        "samples": arguments.n,
        "seed": arguments.seed,
        "temperature": None if arguments.temperature is None else tuple(arguments.temperature),
    }
    if arguments.from_shards is None:
        return {name: value for name, value in typed.items() if value is not None}
    there = shard_settings(pipeline, arguments.from_shards)
    for name, value in typed.items():
        if value is not None and (once_if_same(value) if isinstance(value, tuple) else value) != there[name]:
            raise ArgumentError(
                f"{name}: the samples in {arguments.from_shards} have {there[name]}, got {value}; leave it out"
            )
    return there


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    with locked(folder):
        sweep(folder)
        yield


def _networks(arguments: argparse.Namespace, device: str) -> tuple[FeatureExtractor | None, nn.Module | None]:
    """Features for sample metrics, and the classifier that rejects."""
    if arguments.inception is not None and arguments.features is not None:
        raise ArgumentError("--inception and --features: expected one of them, got both")
    source = arguments.classifier
    if source is None and arguments.run is not None and (arguments.run / CLASSIFIER / "model").is_dir():
        source = arguments.run
    classifier = None if source is None else load_classifier(source, device, "--classifier")
    if arguments.inception is not None:
        return InceptionFeatures(arguments.inception).to(device), classifier
    if arguments.features is not None:
        return ClassifierFeatures(load_classifier(arguments.features, device, "--features")), classifier
    return None if classifier is None else ClassifierFeatures(classifier), classifier
