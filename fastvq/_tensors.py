"""Files of tensors, read without running anything that they hold."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvq._files import first_line, reading
from fastvq.errors import CorruptFileError, MissingFileError

_ZIP = b"PK\x03\x04"


def read_safetensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own: the file's would change with the file.

    Args:
        prefix: only tensors whose names begin so are read; their names lose it.

    Raises:
        CorruptFileError: not a whole safetensors file.
    """
    with reading(f"{path}: not a whole safetensors file"):
        stored = load_file(path)
        return {name.removeprefix(prefix): stored[name].clone() for name in stored if name.startswith(prefix)}


def read_checkpoint(argument: str, path: Path, *allowed: type) -> Any:
    """What ``torch.save`` wrote, or the tensors of a ``.safetensors`` file, on the CPU.

    Args:
        argument: what messages call the path.
        allowed: classes that may be unpickled beside tensors and plain containers.

    Raises:
        MissingFileError: no such file.
        CorruptFileError: the file is damaged, or loading it would run code that it names.
    """
    if not path.is_file():
        raise MissingFileError(f"{argument}: {path} does not exist or is not a file")
    with reading(f"{argument}: {path} is damaged or not a checkpoint"):
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        _require_whole(path)
        try:
            with torch.serialization.safe_globals(list(allowed)):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            needed = _other_globals(path, allowed)
            if not needed:
                raise CorruptFileError(
                    f"{argument}: {path} is not a checkpoint of tensors ({first_line(error)})"
                ) from error
            accepted = ["plain containers", *(f"{kind.__module__}.{kind.__name__}" for kind in allowed)]
            raise CorruptFileError(
                f"{argument}: {path} asks for {', '.join(needed)}, which loading would import and run; expected "
                f"tensors, {' and '.join(accepted)}. Save the state dict alone where you trust the file"
            ) from error


def _require_whole(path: Path) -> None:
    """Compare the checksums of a zip archive's records, which torch.load does not."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    with zipfile.ZipFile(path) as archive:
        # PyTorch can be told to write none.
        damaged = archive.testzip() if any(record.CRC for record in archive.infolist()) else None
    if damaged is not None:
        raise ValueError(f"the checksum of its record {damaged} does not fit")


def _other_globals(path: Path, allowed: tuple[type, ...]) -> list[str]:
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        # Only a help to the message: files of the oldest format, and damaged ones, cannot be listed.
        return []
