"""A project folder: one run per model, the codes between them, and the data they came from."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvq._files import read_json, remove_leftovers, write_json
from fastvq._schema import FLAG, TEXT, integer, number, optional, require_entries, several
from fastvq.data import Augment
from fastvq.data.pictures import picture_types
from fastvq.errors import ArgumentError, FileConflictError, MissingFileError
from fastvq.models import HierarchicalVQVAE
from fastvq.models.limits import MOST_LEVELS
from fastvq.models.pretrained import CONFIG_FILE
from fastvq.sampling import Pipeline, shipped
from fastvq.sampling.project import (
    DATA_FILE,
    codes_folder,
    is_project,
    load_vqvae,
    other_autoencoder,
    prior_run,
    vqvae_run,
)
from fastvq.training.checkpoint import DESCRIPTION as CHECKPOINT_FILE
from fastvq.training.run import CONFIG, RunFolder
from fastvq.training.weights import best_validation

DATA = {
    "data": TEXT,
    "size": several(integer(1, 2**20), least=2, most=2),
    "channels": integer(1, 2**20),
    "class_names": several(TEXT),
    "skip_broken": FLAG,
    "flip": FLAG,
    "shift": integer(0, 2**20),
    "validation": number(0, 1),
    "seed": integer(),
}
# What projects of before lack.
_LATER = {
    "data_from_run": TEXT,
    "suffixes": several(TEXT),
    "draft": FLAG,
    "images": optional(integer()),
    "fingerprint": optional(TEXT),
}


class Project:
    """Paths inside a project folder."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise FileConflictError(f"--run: {path} is a file, expected a folder")
        self.path = path
        self.data = path / DATA_FILE
        self.files = path / "files.json"
        self.cache = path / "cache"
        self.vqvae = vqvae_run(path)
        self.codes = codes_folder(path)
        self.validation_codes = path / "codes" / "validation"
        self.code_parts = path / "codes" / "parts"

    def prior(self, level: int) -> Path:
        return prior_run(self.path, level)

    @property
    def started(self) -> bool:
        """Whether stage 1 has begun."""
        return self.vqvae.is_dir() and any(not entry.name.startswith(".") for entry in self.vqvae.iterdir())

    def require_free(self, *, resume: bool) -> None:
        """Find out that a run of stage 1 would meet another before opening any image."""
        if self.started and not resume:
            raise FileConflictError(f"--run: {self.vqvae} holds a run; go on with --resume or choose another folder")

    def write_data(self, description: dict[str, Any]) -> None:
        remove_leftovers(self.data)
        write_json(self.data, description)

    def write_files(self, description: dict[str, Any]) -> None:
        remove_leftovers(self.files)
        write_json(self.files, description)

    def read_data(self) -> dict[str, Any]:
        if not self.data.is_file():
            raise MissingFileError(f"--run: {self.path} holds no {self.data.name}; run `fastvq train-vqvae` first")
        description = read_json(self.data)
        require_entries(self.data, description, DATA)
        require_entries(self.data, description, _LATER, absent=True)
        return description

    def require_same_autoencoder(self, recorded: object, vqvae: HierarchicalVQVAE, what: Path) -> None:
        """Codes, and priors over them, say which autoencoder they belong to (``recorded``, a checksum).

        Raises:
            FileConflictError: another one than the project's.
        """
        reason = other_autoencoder(self.path, recorded, vqvae, what)
        if reason is not None:
            raise FileConflictError(f"--run: {reason}")

    def load_vqvae(self, device: str) -> HierarchicalVQVAE:
        try:
            return load_vqvae(self.path, device)
        except MissingFileError as error:
            raise MissingFileError(f"--run: {error}") from error

    def stages(self) -> dict[str, str]:
        """The state of each run by its name."""
        folder = RunFolder(self.vqvae)
        model = folder.record()["model"] if folder.config.is_file() else {}
        require_entries(folder.config, model, {"strides": several(integer(1), most=MOST_LEVELS)}, absent=True)
        runs = [self.vqvae, *map(self.prior, range(len(model.get("strides", ()))))]
        return {run.name: self.state(run) for run in runs}

    def state(self, run: Path) -> str:
        """How far a run is, in words."""
        if not (run / CONFIG).is_file():
            return "has not begun"
        folder = RunFolder(run)
        best = best_validation(run)
        found = "" if best is None else f"; best validation {best['metric']} {best['value']:.4g} at step {best['step']}"
        if folder.finished:
            return f"finished, {folder.steps} steps{found}"
        return f"unfinished, step {folder.done} of {folder.steps}{found}"


def is_one_model(folder: Path) -> bool:
    """A saved model, a run or a checkpoint."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, CHECKPOINT_FILE))


def load_pipeline(checkpoint: Path | None, pretrained: str | None, device: str, weights: str = "last") -> Pipeline:
    """The pipeline that ``--checkpoint`` or ``--pretrained`` names; says on stderr what of it is unfinished."""
    if checkpoint is not None and not checkpoint.exists() and str(checkpoint) in shipped():
        raise MissingFileError(
            f"--checkpoint: no folder {checkpoint}; the model that ships is --pretrained {checkpoint}"
        )
    if checkpoint is None or not is_project(checkpoint):
        if weights != "last":
            raise ArgumentError(f"--weights: a saved pipeline has no {weights} weights, only those saved")
        return Pipeline.from_pretrained(pretrained or "" if checkpoint is None else checkpoint, device=device)
    pipeline = Pipeline.from_pretrained(checkpoint, device=device, weights=weights)
    for name, state in Project(checkpoint).stages().items():
        if state.startswith("unfinished"):
            print(f"fastvq: note: {checkpoint / name} is {state}", file=sys.stderr)
    return pipeline


def say_next_priors(project: Path, levels: int) -> None:
    """What learns the codes that are there now."""
    for level in range(levels):
        print(f"{'next:' if level == 0 else '     '} fastvq train-prior --run {project} --level {level}")


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


def require_folder_name(out: Path) -> None:
    """An output that becomes a folder must not be named like a picture."""
    if out.suffix.lower() in picture_types() and not out.is_dir():
        raise ArgumentError(f"--out: expected the name of a folder, got {out}, which ends like a picture's")


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
