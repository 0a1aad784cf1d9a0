"""Writing files so that an interruption at any point leaves either the old contents or the new ones.

Replacing a folder takes two renames. A kill just between them leaves the old folder beside its place, under a hidden
name that ends in ``.old``; the next one to replace it puts it back. Temporary names hold the process that made them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastvq.errors import CorruptFileError, DiskFullError, FileConflictError, MissingFileError, UnavailableError

SEAL = "checksum"

# No space, quota spent, file larger than allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 1 << 20
_BEGAN = time.time()
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)-[0-9a-f]{8}\.(tmp|old)")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the operating system to put a file or a folder entry on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_named(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns what a full disk, a spent quota or a limit on file sizes raises inside the block into a DiskFullError.

    Args:
        needed: bytes that the file takes, where they are known.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None or number not in _FULL:
            raise
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        wanted = "more bytes than that" if needed is None else f"{needed} bytes"
        raise DiskFullError(
            f"{path}: {os.strerror(number)}; {shutil.disk_usage(there).free} bytes are free, {wanted} are needed"
        ) from error


def _error_number(error: Exception) -> int | None:
    """The system's number of an error, also of those that libraries written in Rust pass on as text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def reserve(path: Path, size: int) -> None:
    """Give a file this size in bytes and the disk space for all of it; what it holds already stays.

    Writing to a memory map of a file with holes ends the process where the disk is full.

    Raises:
        DiskFullError: there is no room; the file is as it was, or is not there if it was not.
    """
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    before = os.fstat(descriptor).st_size
    try:
        with full_disk_named(path, size):
            _allocate(descriptor, before, size)
    except BaseException:
        os.ftruncate(descriptor, before)
        if new:
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, before: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    for start in range(before, size, _BLOCK):
        block = bytes(min(_BLOCK, size - start))
        if os.pwrite(descriptor, block, start) < len(block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def new_array(path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> np.memmap:
    """A writable memory map of a new array file, zeros, whose disk space is there already.

    Raises:
        DiskFullError: there is no room; the file is not there.
    """
    header = io.BytesIO()
    description = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
    np.lib.format.write_array_header_1_0(header, {**description, "shape": shape})
    size = len(header.getvalue()) + math.prod(shape) * np.dtype(dtype).itemsize
    path.unlink(missing_ok=True)
    reserve(path, size)
    with path.open("r+b") as file:
        file.write(header.getvalue())
    array = np.load(path, mmap_mode="r+", allow_pickle=False)
    assert isinstance(array, np.memmap)
    return array


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """A new safetensors file, for whose tensors there is room, with the permissions that any new file gets.

    Raises:
        DiskFullError: there is no room; the file is not there.
    """
    from safetensors.torch import save_file

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    reserve(path, size)
    mode = path.stat().st_mode
    path.unlink()
    # safetensors writes a file of its own naming, readable by its owner alone, and renames it.
    folder = _temporary(path, "tmp")
    try:
        folder.mkdir()
        with full_disk_named(path, size):
            save_file(dict(tensors), folder / path.name, metadata=metadata)
        (folder / path.name).chmod(mode)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of ``path`` when the block ends well.

    Raises:
        DiskFullError: there is no room; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path, "tmp")
    try:
        with full_disk_named(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes ``folder`` when the block ends well.

    Raises:
        FileConflictError: ``folder`` holds something and ``overwrite`` is False.
        DiskFullError: there is no room; ``folder`` is as it was.
    """
    remove_leftovers(folder)
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileConflictError(f"{folder} exists already and is not an empty folder; nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder, "tmp")
    try:
        with full_disk_named(folder):
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                sync(path)
            sync(temporary)
            if folder.exists():
                retired = _temporary(folder, "old")
                retired.mkdir()
                os.replace(folder, retired / folder.name)
                os.replace(temporary, folder)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder: whole or not there at any time, and :func:`remove_leftovers` ends what a kill interrupted."""
    temporary = _temporary(folder, "tmp")
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def _temporary(path: Path, kind: str) -> Path:
    """A new hidden name beside a path, which says whose it is."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def remove_leftovers(*paths: Path) -> None:
    """Put right what a process killed while it replaced one of these, all in one folder, left beside it."""
    by_name = {path.name: path for path in paths}
    parent = paths[0].parent
    if not parent.is_dir():
        return
    for entry in os.scandir(parent):
        name = _LEFTOVER.fullmatch(entry.name)
        if name and name["name"] in by_name and not _in_use(int(name["process"]), entry.stat().st_mtime):
            _remove_leftover(Path(entry.path), by_name[name["name"]])


def sweep(folder: Path) -> None:
    """:func:`remove_leftovers` of everything in a folder and below, which this process must have for itself."""
    for place, folders, files in os.walk(folder, topdown=False):
        for entry in (*folders, *files):
            name = _LEFTOVER.fullmatch(entry)
            if name:
                _remove_leftover(Path(place, entry), Path(place, name["name"]))


def _remove_leftover(leftover: Path, path: Path) -> None:
    if leftover.suffix == ".old" and (leftover / path.name).exists() and not path.exists():
        os.replace(leftover / path.name, path)
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def _in_use(process: int, changed: float) -> bool:
    if process == os.getpid():
        return changed >= _BEGAN  # in a container an earlier process often had the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def reading(failure: str) -> Iterator[None]:
    """Around the reading of a file: whatever a parser raises becomes a CorruptFileError.

    Args:
        failure: names the file and says what it is not; the parser's own words follow in brackets.
    """
    try:
        yield
    except (CorruptFileError, MissingFileError, FileConflictError, UnavailableError, PermissionError):
        raise
    except Exception as error:
        raise CorruptFileError(f"{failure} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with a checksum over all of them, which :func:`require_seal` compares."""
    return {**value, SEAL: _seal(value)}


def require_seal(path: Path, value: Mapping[str, Any]) -> None:
    """The entries read from a file must be those that were written; older files without a checksum pass.

    Raises:
        CorruptFileError: some entry has another value.
    """
    with reading(f"{path}: cannot be compared with its checksum"):
        if SEAL in value and value[SEAL] != _seal(value):
            raise CorruptFileError(f"{path}: its entries do not fit the {SEAL} among them; something in it was changed")


def _seal(value: Mapping[str, Any]) -> str:
    # Through JSON once, for what it makes of tuples and names.
    entries = json.loads(json.dumps({name: entry for name, entry in value.items() if name != SEAL}))
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """A file of UTF-8, whole or not; what was there is replaced.

    Raises:
        DiskFullError: there is no room; the file is as it was.
    """
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MissingFileError: no such file.
        CorruptFileError: anything else.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    with reading(f"{path}: not valid JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
