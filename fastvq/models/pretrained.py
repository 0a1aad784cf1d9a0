"""Models as local folders: ``config.json`` and ``model.safetensors``, tied together by a checksum."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import fastvq
from fastvq._files import read_json, replacing_folder, sha256, write_json
from fastvq.errors import ArgumentError, CorruptFileError, MissingFileError
from fastvq.models.config import Config
from fastvq.models.stored import assign, differences, outline

FORMAT = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class PretrainedModel(nn.Module):
    """Base of all models: built from ``config``, saved to and loaded from a folder, made from a named preset."""

    config_class: ClassVar[type[Config]]
    config: Any

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A freshly initialised model of the preset table, some fields of its configuration replaced."""
        from fastvq.models.presets import preset

        model_class, config = preset(name, **overrides)
        if model_class is not cls:
            raise ArgumentError(f"name: preset {name!r} is a {model_class.__name__}, not a {cls.__name__}")
        return cls(config)

    def fill_unstored(self) -> None:
        """Compute the buffers that are not stored; a class of this package that has some does so here."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write configuration and weights to a folder, whole or not at all; returns its path.

        Raises:
            FileConflictError: the folder holds something and ``overwrite`` is False.
        """
        folder = Path(folder)
        with replacing_folder(folder, overwrite=overwrite) as temporary:
            weights = temporary / WEIGHTS_FILE
            save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, weights)
            description = {
                "format": FORMAT,
                "model": type(self).__name__,
                "config": self.config.to_dict(),
                "sha256": sha256(weights),
                "fastvq_version": fastvq.__version__,
            }
            write_json(temporary / CONFIG_FILE, description)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """The model stored in a local folder, in evaluation mode.

        Raises:
            MissingFileError: no such folder, or a file is missing in it.
            CorruptFileError: damaged files, or weights that do not belong to the configuration.
            ArgumentError: the folder holds another class of model.
        """
        model = load_pretrained(folder, device=device)
        if not isinstance(model, cls):
            raise ArgumentError(f"folder: {folder} holds a {type(model).__name__}, not a {cls.__name__}")
        return model


def load_pretrained(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> PretrainedModel:
    """Whatever model a folder holds, in the types that were stored; see :meth:`PretrainedModel.from_pretrained`."""
    from fastvq.models.presets import MODEL_CLASSES

    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(
            f"folder: {folder} does not exist or is not a folder; models are loaded from local folders"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise MissingFileError(f"folder: {folder} holds no {name}, so it is not a saved model")
    description = read_json(folder / CONFIG_FILE)
    if description.get("format") != FORMAT:
        raise CorruptFileError(f"{folder / CONFIG_FILE}: format {description.get('format')!r}, expected {FORMAT}")
    model_class = MODEL_CLASSES.get(str(description.get("model")))
    if model_class is None:
        raise CorruptFileError(
            f"{folder / CONFIG_FILE}: model {description.get('model')!r}, expected one of {sorted(MODEL_CLASSES)}"
        )
    if sha256(folder / WEIGHTS_FILE) != description.get("sha256"):
        raise CorruptFileError(f"{folder / WEIGHTS_FILE}: checksum differs from the one in {CONFIG_FILE}")
    try:
        config = model_class.config_class.from_dict(description["config"])
        model = outline(lambda: model_class(config))
        # Copies: the file's own memory would change with the file.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
        wrong = differences(model.state_dict(), {name: tensor.shape for name, tensor in tensors.items()})
        if wrong:
            raise ArgumentError("; ".join(wrong[:3]))
        assign(model, tensors)
        model.fill_unstored()
    except (SafetensorError, RuntimeError, KeyError, TypeError, ArgumentError) as error:
        raise CorruptFileError(f"{folder}: weights and configuration do not fit together ({error})") from error
    return model.to(device).eval()
