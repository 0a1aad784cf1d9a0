"""A project folder: one run per model, the codes between them, and the data they came from."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvq._files import read_json, write_json
from fastvq.data import Augment, Digits, ImageDataset, ImageFolder
from fastvq.errors import ArgumentError, CorruptFileError, FileConflictError, MissingFileError
from fastvq.models import HierarchicalVQVAE, Prior, load_pretrained
from fastvq.sampling import Pipeline
from fastvq.sampling.pipeline import PIPELINE_FILE


class Project:
    """Paths inside a project folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data.json"
        self.vqvae = path / "vqvae"
        self.codes = path / "codes" / "train"
        self.validation_codes = path / "codes" / "validation"

    def prior(self, level: int) -> Path:
        return self.path / f"prior{level}"

    def write_data(self, description: dict[str, Any], *, resume: bool) -> None:
        """Record where the images come from; a started run keeps what it was started with."""
        started = self.vqvae.is_dir() and any(self.vqvae.iterdir())
        if started and not resume:
            raise FileConflictError(f"--run: {self.vqvae} holds a run; go on with --resume or choose another folder")
        if started:
            there = self.read_data()
            changed = [name for name, value in description.items() if there.get(name) != value]
            if changed:
                details = ", ".join(f"{name}: {there.get(name)!r} there, {description[name]!r} now" for name in changed)
                raise FileConflictError(f"--run: the run in {self.vqvae} was started with other data ({details})")
        else:
            write_json(self.data, description)

    def read_data(self) -> dict[str, Any]:
        if not self.data.is_file():
            raise MissingFileError(f"--run: {self.path} holds no {self.data.name}; run `fastvq train-vqvae` first")
        return read_json(self.data)

    def load_vqvae(self, device: str) -> HierarchicalVQVAE:
        model = self._trained(self.vqvae, device, "fastvq train-vqvae")
        if not isinstance(model, HierarchicalVQVAE):
            raise CorruptFileError(f"{self.vqvae}: expected an autoencoder, found a {type(model).__name__}")
        return model

    def load_prior(self, level: int, device: str) -> Prior:
        model = self._trained(self.prior(level), device, f"fastvq train-prior --level {level}")
        if not isinstance(model, Prior):
            raise CorruptFileError(f"{self.prior(level)}: expected a prior, found a {type(model).__name__}")
        return model

    def load_pipeline(self, device: str) -> Pipeline:
        vqvae = self.load_vqvae(device)
        priors = [self.load_prior(level, device) for level in range(vqvae.num_levels)]
        names = self.read_data().get("class_names") if priors[0].config.num_classes else None
        return Pipeline(vqvae, priors, class_names=names or None)

    def _trained(self, run: Path, device: str, command: str) -> Any:
        if not (run / "model").is_dir():
            state = "has not finished training" if run.is_dir() else "does not exist"
            raise MissingFileError(f"{run} {state}; run `{command} --run {self.path}`")
        return load_pretrained(run / "model", device=device)


def load_pipeline(checkpoint: Path | None, pretrained: str | None, device: str) -> Pipeline:
    """The pipeline that ``--checkpoint`` or ``--pretrained`` names."""
    if checkpoint is None or (checkpoint / PIPELINE_FILE).is_file():
        if checkpoint is not None:
            return Pipeline.from_pretrained(checkpoint.absolute(), device=device)
        return Pipeline.from_pretrained(str(pretrained), device=device)
    if not checkpoint.is_dir():
        raise MissingFileError(f"--checkpoint: no folder {checkpoint}")
    if not Project(checkpoint).vqvae.is_dir():
        raise MissingFileError(
            f"--checkpoint: {checkpoint} is neither a project folder (with vqvae/, prior0/, ...) "
            f"nor a saved pipeline (with {PIPELINE_FILE})"
        )
    return Project(checkpoint).load_pipeline(device)


def open_data(
    data: str, size: Sequence[int] | None, channels: int, *, skip_broken: bool = False, quiet: bool = False
) -> ImageDataset:
    """The data set that ``--data`` names."""
    if size is not None and len(size) > 2:
        raise ArgumentError(f"--size: expected one side, or height and width, got {len(size)} numbers")
    pair = None if size is None else (size[0], size[-1])
    if data == "digits":
        if channels != 1:
            raise ArgumentError(f"--data: the digits have 1 channel, the model takes {channels}")
        return Digits(pair or 32)
    if pair is None:
        raise ArgumentError("--size: images from a folder need a size")
    return ImageFolder(data, pair, channels=channels, skip_broken=skip_broken, progress=not quiet)


def augmentation(description: dict[str, Any]) -> Augment | None:
    shift, flip = int(description["shift"]), bool(description["flip"])
    return Augment(max_shift=shift, horizontal_flip=flip) if shift or flip else None


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """``FIELD=VALUE`` pairs; values are Python literals, or else plain words."""
    overrides: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ArgumentError(f"--set: expected FIELD=VALUE, got {setting!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        overrides[name] = value
    return overrides


def choose_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"--device: expected a name such as cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"--device: {name} is not here; {torch.cuda.device_count()} CUDA device(s) found")
    return name
