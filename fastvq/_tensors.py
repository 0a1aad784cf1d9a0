"""Files of tensors, read without running anything that they hold."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastvq._files import first_line, reading, reserve
from fastvq.errors import CorruptFileError, MissingFileError

# Shape and element type of each tensor.
Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]

_ZIP = b"PK\x03\x04"
_MAPPED = {
    **{f"I{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
_TYPES = {"uint8": "U8", "uint16": "U16", "int32": "I32", "int64": "I64"}


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


def read_rows(path: Path, name: str, rows: slice) -> np.ndarray:
    """Some rows of a tensor of a safetensors file, read alone.

    Raises:
        CorruptFileError: not a whole safetensors file, or without such a tensor.
    """
    with reading(f"{path}: not a whole safetensors file with {name}"), safe_open(path, "np") as file:
        found: np.ndarray = file.get_slice(name)[rows]
        return found


def mapped_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Memory maps, to read, of the tensors of a safetensors file that hold integers, or floats of NumPy.

    Raises:
        CorruptFileError: not a whole safetensors file.
    """
    with reading(f"{path}: not a whole safetensors file"):
        with safe_open(path, "np"):  # which checks the header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        found = {}
        for name, entry in entries.items():
            if name == "__metadata__" or entry["dtype"] not in _MAPPED:
                continue
            shape, dtype, (begin, end) = tuple(entry["shape"]), _MAPPED[entry["dtype"]], entry["data_offsets"]
            empty = begin == end  # the system maps no empty stretch
            found[name] = np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", 8 + length + begin, shape)
        return found


def smallest_type(num_codes: int) -> np.dtype:
    """The smallest integer type that holds codes 0..num_codes-1."""
    return next(np.dtype(name) for name in ("uint8", "uint16", "int32") if num_codes - 1 <= np.iinfo(name).max)


def new_tensors(path: Path, specs: Specs) -> dict[str, np.ndarray]:
    """Writable memory maps of the tensors of a new safetensors file, zeros, whose disk space is there already.

    Raises:
        DiskFullError: there is no room; the file is not there.
    """
    header, size = _header(specs)
    path.unlink(missing_ok=True)
    reserve(path, size)
    with path.open("r+b") as file:
        file.write(header)
    return mapped_tensors(path, specs)


def mapped_tensors(path: Path, specs: Specs) -> dict[str, np.ndarray]:
    """Writable memory maps of the tensors of a file that :func:`new_tensors` made.

    Raises:
        CorruptFileError: it holds something else.
    """
    header, size = _header(specs)
    with path.open("rb") as file:
        if file.read(len(header)) != header or path.stat().st_size != size:
            raise CorruptFileError(f"{path}: not a file of the tensors {', '.join(specs)} as they should be")
    arrays = {}
    for name, (begin, _) in _places(specs).items():
        shape, dtype = specs[name]
        # The system maps no empty stretch.
        arrays[name] = (
            np.memmap(path, dtype, "r+", len(header) + begin, shape) if math.prod(shape) else np.empty(shape, dtype)
        )
    return arrays


def _places(specs: Specs) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends among the bytes of all, in the order of safetensors: large elements first."""
    places, end = {}, 0
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        places[name] = begin, end
    return places


def _header(specs: Specs) -> tuple[bytes, int]:
    """What a safetensors file of these tensors begins with, and its size in bytes."""
    places = _places(specs)
    entries = {
        name: {"dtype": _TYPES[specs[name][1].name], "shape": specs[name][0], "data_offsets": place}
        for name, place in places.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + max((end for _, end in places.values()), default=0)


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
