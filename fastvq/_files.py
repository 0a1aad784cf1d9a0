"""Writing files so that an interruption at any point leaves either the old contents or the new ones.

Replacing a folder takes two renames. A kill just between them leaves the old folder beside its place, under a hidden
name that ends in ``.old``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastvq.errors import CorruptFileError, FileConflictError, MissingFileError, UnavailableError

SEAL = "checksum"


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
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes ``folder`` when the block ends well."""
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileConflictError(f"{folder} exists already and is not an empty folder; nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            os.replace(folder, retired / folder.name)
            os.replace(temporary, folder)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def write_json(path: Path, value: Any) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
