"""The image files below a folder, and what else lies there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastvq.errors import MissingFileError

# Why a name is left out.
HIDDEN, WRITTEN, EXCLUDED, TYPE, EMPTY = (
    "a hidden name",
    "a folder that fastvq wrote",
    "excluded",
    "not a type of picture that is read",
    "a class folder without an image",
)


class Search:
    """The image files below a folder, and what else lies there."""

    def __init__(self, suffixes: tuple[str, ...], exclude: Sequence[str | os.PathLike[str]]) -> None:
        self.left_out: list[tuple[Path, str]] = []
        self.first_level: list[Path] = []
        self._suffixes = suffixes
        self._exclude = [identity(Path(path)) for path in exclude if Path(path).is_dir()]

    def images(self, folder: Path, above: tuple[tuple[int, int], ...] = (), name: str = "") -> Iterator[str]:
        """Paths below the root, with slashes. No path objects: a million of them takes half a minute to make.

        Args:
            above: identifies the folders on the way here, so that links form no loop.
            name: the folder's below the root, with a slash at its end.
        """
        try:
            here = (*above, identity(folder))
            entries = list(os.scandir(folder))
        except OSError as error:
            raise MissingFileError(f"root: cannot read the folder {folder} ({error.strerror})") from error
        for entry in entries:
            if entry.name.startswith("."):
                self.left_out.append((Path(entry.path), HIDDEN))
            elif entry.is_dir():
                path = Path(entry.path)
                if identity(path) in here:
                    continue
                reason = self._reason(path)
                if reason is not None:
                    self.left_out.append((path, reason))
                    continue
                if not above:
                    self.first_level.append(path)
                yield from self.images(path, here, f"{name}{entry.name}/")
            elif entry.name.lower().endswith(self._suffixes):
                yield name + entry.name
            else:
                self.left_out.append((Path(entry.path), TYPE))

    def _reason(self, folder: Path) -> str | None:
        """Why a folder is left out, or None."""
        try:
            if identity(folder) in self._exclude:
                return EXCLUDED
            names = set(os.listdir(folder))
        except OSError as error:
            raise MissingFileError(f"root: cannot read the folder {folder} ({error.strerror})") from error
        written = (
            {"data.json", "vqvae"} <= names  # a project
            or ("config.json" in names and not names.isdisjoint({"checkpoints", "logs", "model.safetensors"}))
            or "pipeline.json" in names
            or {"samples.json", "codes.safetensors"} <= names
            or {"evaluation.json", "README.md"} <= names
        )
        return WRITTEN if written else None


def identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
