"""Processes of one group, forked from the tests' own, which has everything imported."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Ended(NamedTuple):
    """How a process ended: exit status, or minus a signal's number, and what it printed."""

    status: int
    output: str
    errors: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start_group(size: int, folder: Path, work: Callable[[int], object]) -> list[int]:
    """Fork ``size`` processes that call ``work`` with their number, and whose environment is torchrun's.

    The status of one is 1 where ``work`` raises, 130 for KeyboardInterrupt, and else what it returns if that is one.
    """
    assert torch.get_num_threads() == 1, "a forked process cannot use the other threads of its parent"
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    started = []
    for rank in range(size):
        process = os.fork()
        if process:
            started.append(process)
            continue
        status = 1
        try:
            for number, name in ((1, "output"), (2, "errors")):
                os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            # What pytest has put in their place writes to its own files.
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
            status = int(work(rank) or 0)  # type: ignore[call-overload]
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return started


def end_group(started: list[int], folder: Path, seconds: float = 90) -> list[Ended]:
    """Wait for all processes; those that are still there after some seconds are killed, and it fails."""
    deadline = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    while len(statuses) < len(started) and time.monotonic() < deadline:
        for process in started:
            if process not in statuses:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    statuses[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    hanging = [process for process in started if process not in statuses]
    for process in hanging:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    texts = [[(folder / f"{name}{rank}").read_text() for name in ("output", "errors")] for rank in range(len(started))]
    assert not hanging, f"processes {[started.index(one) for one in hanging]} hung: {texts}"
    return [Ended(statuses[process], *text) for process, text in zip(started, texts, strict=True)]


def run_group(size: int, folder: Path, work: Callable[[int], object], seconds: float = 90) -> list[Ended]:
    return end_group(start_group(size, folder, work), folder, seconds)
