"""``fastvq train-classifier``: the network behind sample metrics and rejection sampling."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastvq.cli.described import DescribedImages, described
from fastvq.cli.loading import advise, keep_images, remember, require_cache_place, with_workers
from fastvq.cli.names import configure
from fastvq.cli.project import Project, augmentation, choose_device, parse_overrides
from fastvq.cli.resume import recorded, recorded_config, refuse, shown, starting_config, train_config
from fastvq.cli.summary import Start, announce, of_images
from fastvq.data import ImageDataset
from fastvq.distributed import join
from fastvq.errors import ArgumentError, MissingFileError
from fastvq.models import load_pretrained
from fastvq.models.classifier import Classifier, ClassifierConfig
from fastvq.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from fastvq.training import TrainConfig
from fastvq.training.classifier import train_classifier as train_on_images
from fastvq.training.log import last_validation
from fastvq.training.run import CONFIG, require_new

CLASSIFIER = "classifier"


def train_classifier(arguments: argparse.Namespace) -> None:
    with join() as group:
        arguments.quiet |= not group.first
        with group.together():
            run, dataset, description, split, model_config, config = _prepare(arguments)
            start = Start(
                run=run,
                model=model_config,
                config=config,
                data=of_images(dataset, *map(len, split)),
                rows=len(split[0]),
                size=dataset.size,
                processes=group.size,
            )
            if not announce(arguments, start):
                return
            if group.first:
                remember(dataset)
        advise(dataset, "in a new run with --skip-broken --changed-data")
        keep_images(arguments, Project(arguments.run), dataset, group)
        config = with_workers(arguments, config, dataset, group)
        train_on_images(
            dataset,
            model_config,
            config,
            run,
            indices=split[0],
            validation=(dataset, split[1]),
            augment=augmentation(description),
            resume=arguments.resume,
            init_from=arguments.init_from,
            notes={"data": description},
            progress=shown(arguments),
        )
        if group.first:
            values = last_validation(run, "top1")
            found = f"; validation top-1 accuracy {100 * values['top1']:.2f} %" if values else ""
            print(f"classifier in {run / 'model'}{found}")
            print(f"next: fastvq evaluate {arguments.run}")


class _Prepared(NamedTuple):
    """What ``train-classifier`` has made of its options, before anything is written."""

    run: Path
    dataset: ImageDataset
    description: dict[str, Any]
    split: tuple[np.ndarray, np.ndarray]
    model_config: ClassifierConfig
    config: TrainConfig


def _prepare(arguments: argparse.Namespace) -> _Prepared:
    device = choose_device(arguments.device)
    project, run = Project(arguments.run), arguments.run / arguments.name
    record = recorded(arguments, run)
    there = None if record is None else described(record, run / CONFIG)
    images = DescribedImages(arguments, project, there=there)
    description = images.description
    require_cache_place(arguments, description["data"])
    if record is None:
        require_new(run)

    overrides = parse_overrides(arguments.set)
    # How many classes there are is known once the images are open.
    fields: dict[str, Any] = {"in_channels": description["channels"], "num_classes": 1}
    if record is not None:
        fields = recorded_config(record, run).to_dict()
    elif arguments.init_from is not None:
        fields = starting_config(arguments.init_from).to_dict() | fields
    model_config = configure(ClassifierConfig.from_dict(fields), overrides)
    if record is not None:
        for name in overrides:
            if getattr(model_config, name) != getattr(recorded_config(record, run), name):
                refuse(f"--set {name}", run, fields[name], overrides[name])
    # The images held out of the autoencoder are those held out here.
    config = train_config(
        arguments,
        run,
        device,
        validation_fraction=description["validation"],
        seed=description["seed"],
        image_every=None,
    )
    dataset, description, split = images.open()
    if dataset.num_classes is None:
        raise ArgumentError("--data: a classifier learns from labels; put the images of each class in a sub-folder")
    if record is None and "num_classes" not in overrides:
        model_config = dataclasses.replace(model_config, num_classes=dataset.num_classes)
    return _Prepared(run, dataset, description, split, model_config, config)


def load_classifier(path: Path, device: str, name: str) -> Classifier:
    """The classifier in a project, in its run, or in a model's folder.

    Raises:
        MissingFileError: none of these; says how to train one.
        ArgumentError: another kind of model.
    """
    for folder in (path / CLASSIFIER / "model", path / "model", path):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            model = load_pretrained(folder, device=device)
            if not isinstance(model, Classifier):
                raise ArgumentError(f"{name}: {folder} holds a {type(model).__name__}, expected a classifier")
            return model
    raise MissingFileError(f"{name}: no trained classifier in {path}; run `fastvq train-classifier --run {path}`")
