"""Models as local folders: ``config.json`` and ``model.safetensors``, tied together by checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastvq._config import Config
from fastvq._files import (
    first_line,
    read_json,
    reading,
    replacing_folder,
    require_seal,
    save_tensors,
    sealed,
    sha256,
    write_json,
)
from fastvq._tensors import read_safetensors
from fastvq._version import __version__
from fastvq.errors import ArgumentError, CorruptFileError, FastvqError, MissingFileError
from fastvq.models.registry import Registry, is_ours
from fastvq.models.stored import assign, differences, load_in_place, outline

FORMAT = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class PretrainedModel(nn.Module):
    """Base of all models: built from ``config``, saved to and loaded from a folder, made from a named preset.

    A subclass is built from its configuration alone, an instance of its ``config_class``. Those of this package take
    its fields as keywords as well, alone or to replace some: ``PixelSNAIL(shape=(8, 8), num_codes=512)``.

    From its definition on a subclass is known by its name and its presets, and is what `build` makes of its
    ``config_class`` if it names that itself and no class did before. Of several classes of one name the last one
    counts, but names of this package stay its own.

    Attributes:
        presets: the class's named configurations; subclasses do not inherit them.
    """

    config_class: ClassVar[type[Config]]
    presets: ClassVar[Mapping[str, Config]] = {}
    config: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls)):
            REGISTRY.add(cls)

    @classmethod
    def class_for(cls, config: Any) -> type[PretrainedModel]:
        """The class that is built from a configuration ``config``: this one, or one for just such configurations."""
        return cls

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A freshly initialised model of the preset table.

        Args:
            name: of the preset, see ``fastvq.models.PRESETS``.
            overrides: fields of its configuration to replace.

        Raises:
            ArgumentError: no such preset or field, or a preset of another class; names what there is.
        """
        model_class, config = REGISTRY.preset(name, **overrides)
        if model_class is not cls:
            raise ArgumentError(f"name: preset {name!r} is a {model_class.__name__}, not a {cls.__name__}")
        return cls(config)

    def fill_unstored(self) -> None:
        """Compute the buffers that are not stored; a class of this package that has some does so here."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write configuration and weights to a folder, whole or not at all; returns its path.

        Raises:
            FileConflictError: the folder holds something and ``overwrite`` is False.
            ArgumentError: the model could not be loaded again.
            DiskFullError: there is no room; what was there is as it was.
        """
        folder = Path(folder)
        tensors = _require_loadable(self)
        with replacing_folder(folder, overwrite=overwrite) as temporary:
            weights = temporary / WEIGHTS_FILE
            save_tensors(tensors, weights)
            description = {
                "format": FORMAT,
                "model": type(self).__name__,
                "config": self.config.to_dict(),
                "sha256": sha256(weights),
                "fastvq_version": __version__,
            }
            if not is_ours(type(self)):
                description["module"] = type(self).__module__
            write_json(temporary / CONFIG_FILE, sealed(description))
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


REGISTRY: Registry[PretrainedModel] = Registry()
MODEL_CLASSES, PRESETS, preset = REGISTRY.classes, REGISTRY.presets, REGISTRY.preset


def build(config: Config) -> PretrainedModel:
    """A freshly initialised model of a configuration.

    Args:
        config: of any class of model that is known.

    Raises:
        ArgumentError: no model is built from it.
    """
    return REGISTRY.class_of(config).class_for(config)(config)


def load_pretrained(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> PretrainedModel:
    """Whatever model a folder holds, in evaluation mode, in the types that were stored.

    Args:
        folder: what :meth:`PretrainedModel.save_pretrained` wrote.
        device: where to put it.

    Raises:
        MissingFileError: no such folder, or a file is missing in it.
        CorruptFileError: damaged files, an unknown class of model, or weights that do not belong to the configuration.
    """
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
    require_seal(folder / CONFIG_FILE, description)
    model_class = MODEL_CLASSES.get(str(description.get("model")))
    if model_class is None:
        home = description.get("module")
        raise CorruptFileError(
            f"{folder / CONFIG_FILE}: model {description.get('model')!r}, expected one of {sorted(MODEL_CLASSES)}"
            + (f"; import the module that defines it, {home}, before loading" if home else "")
        )
    if sha256(folder / WEIGHTS_FILE) != description.get("sha256"):
        raise CorruptFileError(f"{folder / WEIGHTS_FILE}: checksum differs from the one in {CONFIG_FILE}")
    misfit = f"{folder}: weights and configuration do not fit together"
    with reading(misfit):
        config = model_class.config_class.from_dict(description.get("config"))  # type: ignore[arg-type]
    return load_stored(model_class, config, folder / WEIGHTS_FILE, misfit).to(device).eval()


def load_stored(
    model_class: type[PretrainedModel], config: Config, path: Path, misfit: str, prefix: str = ""
) -> PretrainedModel:
    """The model of a file of tensors, built only once its names and shapes are known to be those of the weights.

    Args:
        misfit: what an error says that the file does not do.
        prefix: of the names of the model's tensors in the file.

    Raises:
        CorruptFileError: the file is damaged, or holds tensors of another model.
    """
    with reading(misfit), safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        shapes = {name.removeprefix(prefix): tuple(file.get_slice(name).get_shape()) for name in names}
        if config.least_tensors > len(shapes):
            raise ArgumentError(f"{len(shapes)} tensors, expected {config.least_tensors} at least")
        model = skeleton(model_class, config)
        _require_same(model, shapes)
    tensors = read_safetensors(path, prefix)
    with reading(misfit):
        if is_ours(model_class):
            assign(model, tensors)
            model.fill_unstored()
        else:
            load_in_place(model, tensors)
    return model


def skeleton(model_class: type[PretrainedModel], config: Config) -> PretrainedModel:
    """An outline of a class of this package; any other is built whole, for it may compute with its initial values."""
    if is_ours(model_class):
        return outline(lambda: model_class(config))
    with torch.random.fork_rng([]):  # leave the caller's generator alone
        return model_class(config)


def _require_same(model: PretrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
    wrong = differences(model.state_dict(), shapes)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArgumentError("; ".join(wrong[:3]) + more)


def _require_loadable(model: PretrainedModel) -> dict[str, Tensor]:
    """The model's tensors as they are stored, after making sure that a model can be made of them again."""
    model_class = type(model)
    name = model_class.__name__
    registered = MODEL_CLASSES.get(name)
    if registered is not model_class:
        reason = "it is abstract" if registered is None else f"{registered.__module__} has another class of this name"
        raise ArgumentError(f"save_pretrained: a {name} could not be loaded again: {reason}")
    try:
        config = model_class.config_class.from_dict(json.loads(json.dumps(model.config.to_dict())))
        if config != model.config:
            raise ArgumentError(f"its configuration would come back as {config}, not as {model.config}")
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
        _require_same(skeleton(model_class, config), {key: tuple(tensor.shape) for key, tensor in state.items()})
    except (FastvqError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"save_pretrained: a {name} could not be loaded again: {first_line(error)}") from error
    seen: set[int] = set()
    for key, tensor in state.items():
        # Files hold tied tensors one by one; models that tie them do so again when they are built.
        address = tensor.untyped_storage().data_ptr()
        state[key] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return state
