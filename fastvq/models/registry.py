"""Models by their names, by the classes of their configurations, and by their presets."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

from fastvq._config import Config
from fastvq.errors import ArgumentError

M = TypeVar("M")


class Registry(Generic[M]):
    """Model classes, each added as soon as it is defined.

    Attributes:
        classes: by name, which is what a folder holds. Of several classes of one name the last one counts, but names
            of this package stay its own.
        presets: class and configuration by the preset's name.
    """

    def __init__(self) -> None:
        self.classes: dict[str, type[M]] = {}
        self.presets: dict[str, tuple[type[M], Config]] = {}
        self._built: dict[type[Config], type[M]] = {}

    def add(self, model_class: type[M]) -> None:
        """Take a class with its ``presets``. If it names a ``config_class`` itself, it is what is built from that,
        unless another class is already.

        Raises:
            ArgumentError: a preset's name is taken by another class.
        """
        name, own = model_class.__name__, vars(model_class)
        there = self.classes.get(name)
        if there is not None and is_ours(there) and not is_ours(model_class):
            return
        presets: dict[str, Config] = own.get("presets", {})
        for preset in presets:
            if preset in self.presets and self.presets[preset][0] is not there:
                raise ArgumentError(f"presets: {preset!r} is a {self.presets[preset][0].__name__} already")
        self.classes[name] = model_class
        self.presets.update({preset: (model_class, config) for preset, config in presets.items()})
        config_class = own.get("config_class")
        if config_class is not None and self._built.get(config_class, there) is there:
            self._built[config_class] = model_class

    def preset(self, name: str, **overrides: Any) -> tuple[type[M], Config]:
        """Model class and configuration of a preset.

        Args:
            name: of the preset.
            overrides: fields of the configuration to replace.

        Raises:
            ArgumentError: there is no such preset, or no such field; names what there is.
        """
        if name not in self.presets:
            raise ArgumentError(f"name: unknown preset {name!r}, expected one of {', '.join(sorted(self.presets))}")
        model_class, config = self.presets[name]
        config.require_fields("overrides", overrides)
        return model_class, dataclasses.replace(config, **overrides)  # type: ignore[type-var]

    def class_of(self, config: Config) -> type[M]:
        """The class that is built from a configuration, or from one that its class derives from."""
        for config_class in type(config).__mro__:
            if config_class in self._built:
                return self._built[config_class]
        raise ArgumentError(f"config: no model is built from a {type(config).__name__}")


def is_ours(model_class: type) -> bool:
    """Whether a class belongs to this package."""
    return model_class.__module__.partition(".")[0] == "fastvq"
