"""The images of ``train-classifier`` and ``evaluate``: the project's, or as the command line says."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastvq._check import require_number
from fastvq._schema import ENTRIES, FLAG, require_entries
from fastvq.cli.images import DIGITS, image_size, open_data, open_project_images, require_shift, split_images
from fastvq.cli.project import DATA, Project
from fastvq.data import ImageDataset, split_indices
from fastvq.data.base import require_size
from fastvq.errors import MissingFileError

_DEFAULTS: dict[str, Any] = {
    "data": None,
    "size": None,
    "channels": 3,
    "skip_broken": False,
    "flip": False,
    "shift": 0,
    "validation": 0.1,
    "seed": 0,
    "changed_data": False,
}
_DESCRIPTION = {name: DATA.get(name, FLAG) for name in _DEFAULTS}


class DescribedImages:
    """The images of a command, of which all is settled but none opened: the project's, or as the command line says.

    Args:
        there: the description that a run which goes on was started with; it comes before the project's.
        size, channels: those of a model, which count before any others.

    Attributes:
        description: where they lie, and what is done with them.

    Raises:
        MissingFileError: nothing says where they are.
        ArgumentError: a value that no images fit.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        project: Project | None,
        *,
        there: dict[str, Any] | None = None,
        size: Sequence[int] | None = None,
        channels: int | None = None,
    ) -> None:
        recorded = project.read_data() if project is not None and project.data.is_file() else None
        if recorded is None and there is None and arguments.data is None:
            where = "a shipped model" if project is None else project.path
            raise MissingFileError(f"--data: {where} holds no data.json that says where the images are; pass --data")
        description = {name: (recorded or {}).get(name, value) for name, value in _DEFAULTS.items()} | (there or {})
        for name in ("data", "size", "channels", "flip", "shift", "validation"):
            value = getattr(arguments, name, None)
            if value is not None:
                description[name] = value
        for name in ("skip_broken", "changed_data"):
            description[name] = description[name] or bool(getattr(arguments, name))
        if description["data"] == DIGITS and getattr(arguments, "channels", None) is None:
            description["channels"] = 1
        self.description, self._project, self._recorded, self._there = description, project, recorded, there
        self._size, self._channels = size or description["size"], channels or description["channels"]
        self._data, self._quiet = arguments.data, arguments.quiet
        require_number("validation", description["validation"], least=0, below=1)
        if self._size is not None:
            require_shift(description["shift"], require_size("size", image_size(self._size)))

    def open(self) -> tuple[ImageDataset, dict[str, Any], tuple[np.ndarray, np.ndarray]]:
        """The images, their description, now with their size, and their split."""
        description, project, recorded, there = self.description, self._project, self._recorded, self._there
        options = {"skip_broken": description["skip_broken"], "quiet": self._quiet}
        if project is not None and recorded is not None:
            # Where its images lie now the project knows better than a run that took them from it.
            data = there["data"] if self._data is None and there and there["changed_data"] else self._data
            dataset = open_project_images(
                project,
                data,
                size=self._size,
                channels=self._channels,
                changed=description["changed_data"],
                **options,
            )
        else:
            exclude = [] if project is None else [project.path]
            dataset = open_data(description["data"], self._size, self._channels, exclude=exclude, **options)
            project = None
        if description["data"] != DIGITS:
            description["data"] = os.path.abspath(description["data"])
        description |= {"size": list(dataset.size), "channels": dataset.channels}
        if project is not None and recorded is not None and description["validation"] == recorded["validation"]:
            return dataset, description, split_images(project, recorded, dataset)
        return dataset, description, split_indices(len(dataset), description["validation"], description["seed"])


def described(record: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The description that a run kept of what it was started with, if it did; ``path`` is its file's."""
    found: dict[str, Any] | None = record.get("notes", {}).get("data")
    if found is not None:
        require_entries(path, {"data": found}, {"data": ENTRIES})
        require_entries(path, found, _DESCRIPTION)
    return found
