"""A project folder, as training leaves it: a run per model, the codes between them, and the data they came from."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvq._files import read_json
from fastvq.data.codes import DESCRIPTION, model_checksum
from fastvq.data.made_elsewhere import ELSEWHERE
from fastvq.errors import CorruptFileError, FileConflictError, MissingFileError
from fastvq.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, load_pretrained
from fastvq.models.prior import Prior
from fastvq.models.vqvae import HierarchicalVQVAE

DATA_FILE = "data.json"
Device = str | torch.device


def vqvae_run(folder: Path) -> Path:
    return folder / "vqvae"


def prior_run(folder: Path, level: int) -> Path:
    return folder / f"prior{level}"


def is_project(folder: Path) -> bool:
    """Whether training began here. A model itself in ``vqvae`` is part of a saved pipeline, a run holds one deeper."""
    run = vqvae_run(folder)
    trained = run.is_dir() and not (run / WEIGHTS_FILE).is_file()
    return trained or (folder / DATA_FILE).is_file() or made_elsewhere(folder)


def codes_folder(folder: Path) -> Path:
    return folder / "codes" / "train"


def made_elsewhere(folder: Path) -> bool:
    """Whether the project's codes were imported, so that it has no autoencoder."""
    path = codes_folder(folder) / DESCRIPTION
    if vqvae_run(folder).exists() or not path.is_file():
        return False
    arguments = read_json(path).get("arguments")
    return isinstance(arguments, dict) and arguments.get("model") == ELSEWHERE


def how_to_sample_elsewhere(folder: Path) -> str:
    """With an autoencoder that the project does not have."""
    return (
        "sample in Python from fastvq.Pipeline(your_autoencoder, priors), where priors are "
        f'fastvq.training.load_weights("{prior_run(folder, 0)}"), ... (docs/own-autoencoders.md)'
    )


def load_vqvae(folder: Path, device: Device) -> HierarchicalVQVAE:
    """
    Raises:
        MissingFileError: it has not been trained, or not to the end, or the codes were made elsewhere.
    """
    run = vqvae_run(folder)
    if made_elsewhere(folder):
        raise MissingFileError(
            f"the codes of {folder} were made elsewhere, so it holds no autoencoder; {how_to_sample_elsewhere(folder)}"
        )
    if not (run / "model").is_dir():
        state = "has not finished training" if (run / CONFIG_FILE).is_file() else "has not begun"
        raise MissingFileError(f"{run} {state}; run `fastvq train-vqvae --run {folder}`")
    model = load_pretrained(run / "model", device=device)
    if not isinstance(model, HierarchicalVQVAE):
        raise CorruptFileError(f"{run}: expected an autoencoder, found a {type(model).__name__}")
    return model


def load_priors(folder: Path, vqvae: HierarchicalVQVAE, device: Device, weights: str = "last") -> list[Prior]:
    """The priors of all levels, top first, trained or in training.

    Args:
        weights: ``last`` or ``best``, as of :func:`fastvq.training.weights.load_weights`.

    Raises:
        MissingFileError: the training of some has not begun; names all of them.
        FileConflictError: one was trained on the codes of another autoencoder.
    """
    from fastvq.training.run import RunFolder
    from fastvq.training.weights import load_weights

    runs = [prior_run(folder, level) for level in range(vqvae.num_levels)]
    missing = [
        f"{run} has not begun; run `fastvq train-prior --run {folder} --level {level}`"
        for level, run in enumerate(runs)
        if not (run / CONFIG_FILE).is_file() and not (run / "model").is_dir()
    ]
    if missing:
        raise MissingFileError("; ".join(missing))
    priors = []
    for run in runs:
        described = (run / CONFIG_FILE).is_file()
        model = load_weights(run if described else run / "model", weights=weights, device=device)
        if not isinstance(model, Prior):
            raise CorruptFileError(f"{run}: expected a prior, found a {type(model).__name__}")
        learned = RunFolder(run).record()["data"].get("stage1_model") if described else None
        reason = other_autoencoder(folder, learned, vqvae, run)
        if reason is not None:
            raise FileConflictError(reason)
        priors.append(model)
    return priors


def other_autoencoder(folder: Path, recorded: object, vqvae: HierarchicalVQVAE, what: Path) -> str | None:
    """Why ``what``, codes or a prior over them, does not belong to the project's autoencoder; None if it does.

    Args:
        recorded: the checksum of the autoencoder that it belongs to; None if that was not recorded.
    """
    if recorded is None or recorded == model_checksum(vqvae):
        return None
    # The checksum covers the names of the settings, so models of versions that knew others do not compare.
    stored = read_json(vqvae_run(folder) / "model" / CONFIG_FILE).get("config")
    if not isinstance(stored, dict) or stored.keys() != vqvae.config.to_dict().keys():
        return None
    return (
        f"{what} belongs to another autoencoder than the one in {vqvae_run(folder)}, which was perhaps trained"
        f" further; bring that one back, or move {what} elsewhere and make it again"
    )


def class_names(folder: Path) -> list[str] | None:
    """Names of the classes that the project was trained on; None without classes or without such a record."""
    path = folder / DATA_FILE
    names = read_json(path).get("class_names") if path.is_file() else None
    return names or None
