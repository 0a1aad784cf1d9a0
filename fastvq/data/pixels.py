"""Decoded pictures in one file, mapped into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastvq._files import new_array, read_json, sealed, sweep, sync, write_json
from fastvq._lock import locked
from fastvq.errors import FastvqError

FORMAT = 1
_THREADS = 8
_ROWS = 64
_SECONDS = 5.0
_ARRAY, _PROGRESS = "pixels.npy", "pixels.json"


class StoredPixels:
    """Pictures uint8 [N, H, W, C] of a folder that :func:`store_pixels` has filled.

    The file is opened in each process by itself; what goes from one to another is its path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._array: np.ndarray | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        """A copy of one picture, uint8 [H, W, C]."""
        if self._array is None:
            self._array = np.load(self.folder / _ARRAY, mmap_mode="r", allow_pickle=False)
        return np.array(self._array[index])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_array": None}


def stored_pixels(folder: Path, shape: tuple[int, ...], identity: Mapping[str, Any]) -> StoredPixels | None:
    """The pictures in a folder, if all are there and they are those of ``identity``; None for anything else."""
    return StoredPixels(folder) if _rows_done(folder, shape, identity) == shape[0] else None


def store_pixels(
    folder: Path,
    shape: tuple[int, ...],
    identity: Mapping[str, Any],
    read: Callable[[int], np.ndarray],
    *,
    done: Callable[[int], object] = lambda rows: None,
) -> StoredPixels:
    """Fill a folder with pictures, or do what an interrupted call left to do; anything else in it is written over.

    Args:
        shape: (N, H, W, C).
        identity: what the pictures are; JSON holds it.
        read: gives a picture uint8 [H, W, C]; called by several threads.
        done: called every few seconds, and at the end, with how many pictures have been stored since.

    Raises:
        FileConflictError: another process is at it; names it.
        DiskFullError: there is no room for all of them; found out before any is read.
        whatever ``read`` raises; pictures before that stay.
    """
    with locked(folder), ThreadPoolExecutor(_THREADS) as pool:
        sweep(folder)
        first = _rows_done(folder, shape, identity)
        if first == 0:
            (folder / _PROGRESS).unlink(missing_ok=True)
            array = new_array(folder / _ARRAY, shape, np.uint8)
        else:
            array = np.load(folder / _ARRAY, mmap_mode="r+", allow_pickle=False)
        told, saved = first, time.monotonic()
        for start in range(first, shape[0], _ROWS):
            stop = min(start + _ROWS, shape[0])
            for index, pixels in enumerate(pool.map(read, range(start, stop)), start):
                array[index] = pixels
            if stop == shape[0] or time.monotonic() - saved >= _SECONDS:
                array.flush()
                sync(folder / _ARRAY)
                write_json(folder / _PROGRESS, sealed({**_described(shape, identity), "rows_done": stop}))
                done(stop - told)
                told, saved = stop, time.monotonic()
    return StoredPixels(folder)


def _rows_done(folder: Path, shape: tuple[int, ...], identity: Mapping[str, Any]) -> int:
    """How many pictures of ``identity`` a folder holds, from the first on."""
    try:
        found = read_json(folder / _PROGRESS)
        if found != sealed({**_described(shape, identity), "rows_done": found["rows_done"]}):
            return 0
        array = np.load(folder / _ARRAY, mmap_mode="r", allow_pickle=False)
    # What cannot be read is computed anew.
    except (FastvqError, OSError, ValueError, KeyError, EOFError):
        return 0
    rows: int = found["rows_done"]
    return rows if array.shape == shape and array.dtype == np.uint8 else 0


def _described(shape: tuple[int, ...], identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "shape": list(shape), **identity}
