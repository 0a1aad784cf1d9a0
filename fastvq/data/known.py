"""What is known of the files of a folder of images, so that the next start looks only at what is new or changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fastvq._files import replacing_file, save_tensors

FORMAT = 1
# What of a file is known: it could be opened, it could be decoded, it has further frames.
OPENED, DECODED, SEVERAL = 1, 2, 4
_SEPARATOR = "\0"
_TENSORS = ("names", "sizes", "times", "flags")


def read_known(
    path: Path, rules: Mapping[str, str], names: Sequence[str], sizes: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Flags of each of some files, uint8 [N]; 0 where nothing is known, or size or time have changed since.

    A file of flags that is not there, damaged, or written under other ``rules`` or by another version says nothing.

    Args:
        rules: what the flags depend on beside the files.
        sizes, times: in bytes, and in nanoseconds of the last modification: int64 [N].
    """
    flags = np.zeros(len(names), np.uint8)
    found = _read(path, rules)
    if found is None:
        return flags
    stored = found["names"].tobytes()
    if stored == _joined(names):
        rows = np.arange(len(names))
    else:
        places = {name: place for place, name in enumerate(_split(stored))}
        rows = np.array([places.get(name, -1) for name in names], np.int64)
    there = rows >= 0
    rows = rows[there]
    same = (found["sizes"][rows] == sizes[there]) & (found["times"][rows] == times[there])
    flags[there] = np.where(same, found["flags"][rows], 0)
    return flags


def write_known(
    path: Path,
    rules: Mapping[str, str],
    names: Sequence[str],
    sizes: np.ndarray,
    times: np.ndarray,
    flags: np.ndarray,
) -> None:
    """Write what :func:`read_known` reads, in place of what was there."""
    arrays = dict(zip(_TENSORS, (np.frombuffer(_joined(names), np.uint8), sizes, times, flags), strict=True))
    with replacing_file(path) as temporary:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        save_tensors(tensors, temporary, metadata=_described(rules, arrays))


def _read(path: Path, rules: Mapping[str, str]) -> dict[str, np.ndarray] | None:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            found = {name: file.get_tensor(name) for name in _TENSORS}
            described = file.metadata() == _described(rules, found)
    # It saves time and decides nothing, whatever may have happened to it.
    except Exception:
        return None
    return found if described else None


def _described(rules: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    digest = hashlib.sha256()
    for name in _TENSORS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    # One entry: safetensors writes several in any order.
    return {"fastvq": json.dumps({"format": FORMAT, **rules, "checksum": digest.hexdigest()})}


def _joined(names: Sequence[str]) -> bytes:
    return _SEPARATOR.join(names).encode(errors="surrogateescape")


def _split(joined: bytes) -> list[str]:
    return joined.decode(errors="surrogateescape").split(_SEPARATOR)
