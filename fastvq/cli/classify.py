"""``fastvq train-classifier``: the network behind sample metrics and rejection sampling."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.cli.images import open_described
from fastvq.cli.names import configure
from fastvq.cli.project import Project, augmentation, choose_device, parse_overrides
from fastvq.errors import ArgumentError, MissingFileError
from fastvq.models import load_pretrained
from fastvq.models.classifier import Classifier, ClassifierConfig
from fastvq.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from fastvq.training import TrainConfig
from fastvq.training.classifier import train_classifier as train_on_images
from fastvq.training.log import last_validation

CLASSIFIER = "classifier"


def train_classifier(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    overrides = parse_overrides(arguments.set)
    project = Project(arguments.run)
    dataset, description, split = open_described(arguments, project)
    if dataset.num_classes is None:
        raise ArgumentError("--data: a classifier learns from labels; put the images of each class in a sub-folder")
    template = ClassifierConfig(in_channels=dataset.channels, num_classes=dataset.num_classes)
    model_config = configure(template, overrides)
    config = TrainConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup,
        ema_decay=arguments.ema or None,
        # The images held out of the autoencoder are those held out here.
        validation_fraction=description["validation"],
        seed=description["seed"] if arguments.seed is None else arguments.seed,
        log_every=arguments.log_every,
        image_every=None,
        checkpoint_every=arguments.checkpoint_every,
        num_workers=arguments.workers,
        device=device,
    )
    run = arguments.run / arguments.name
    train_on_images(
        dataset,
        model_config,
        config,
        run,
        indices=split[0],
        validation=(dataset, split[1]),
        augment=augmentation(description),
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    values = last_validation(run, "top1")
    found = f"; validation top-1 accuracy {100 * values['top1']:.2f} %" if values else ""
    print(f"classifier in {run / 'model'}{found}")
    print(f"next: fastvq evaluate {arguments.run}")


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
