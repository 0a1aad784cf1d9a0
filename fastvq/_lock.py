"""One process at a time in a folder that it fills."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from fastvq.errors import FileConflictError

LOCK = ".lock"

# Locks of the system belong to processes, so those of this one are counted here: path -> (process, thread).
_held: dict[Path, tuple[int, int]] = {}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder, made if need be, for this thread alone. A thread may enter several times.

    The system drops the lock with the process, however it ends; the file ``.lock`` that a killed one leaves is no lock.

    Raises:
        FileConflictError: another process, or thread, has it; names it and its host.
    """
    path = folder.absolute() / LOCK
    me = (os.getpid(), threading.get_ident())
    if _held.get(path) == me:
        yield
        return
    made = _make(folder.absolute())
    descriptor = None
    try:
        if _held.get(path, (0, 0))[0] == me[0]:
            raise FileConflictError(f"{folder} is in use by another thread of this process; nothing was changed")
        descriptor = _acquire(path, folder)
        _held[path] = me
        yield
    finally:
        if descriptor is not None:
            _held.pop(path, None)
            path.unlink(missing_ok=True)
            os.close(descriptor)
        for made_here in made:
            with contextlib.suppress(OSError):  # something is in it now
                made_here.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns what was not there, innermost first."""
    missing = []
    for place in (folder, *folder.parents):
        if place.exists():
            break
        missing.append(place)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(path: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not flock: processes that load data would inherit it and hold it on for a while after a kill.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise FileConflictError(
                    f"{folder} is in use by {holder or 'another process'}; wait for it or stop it. Nothing was changed."
                ) from error
            raise
        # Whoever had the lock before may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)
