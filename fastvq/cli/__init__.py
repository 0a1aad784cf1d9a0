"""The ``fastvq`` command. Parsing and help import nothing heavy; each command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from fastvq.cli.names import as_typed
from fastvq.cli.parser import build_parser
from fastvq.errors import FastvqError, PeerError, Terminated

INTERRUPTED, TERMINATED = 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 a mistake or a failure, 130 Ctrl-C, 143 SIGTERM."""
    arguments = build_parser().parse_args(argv)
    module, _, function = arguments.handler.partition(":")
    try:
        with _unwinding_on_sigterm():
            getattr(importlib.import_module(module), function)(arguments)
    except BrokenPipeError:
        # Whoever read our output has left; closing stdout quietly keeps the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FastvqError, OSError) as error:
        if arguments.debug:
            raise
        words = error.words if isinstance(error, PeerError) else str(error)
        options = arguments.options
        text = as_typed(words, arguments.command, arguments, options)
        if isinstance(error, PeerError) and error.rank is not None:
            text = f"process {error.rank}: {text}"
        if not getattr(error, "said", False):  # by the first process of the group
            notes = [as_typed(note, arguments.command, arguments, options) for note in getattr(error, "__notes__", ())]
            print("\n".join([f"fastvq: error: {text}", *notes]), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        hint = "; run the same command with --resume to go on" if hasattr(arguments, "resume") else ""
        print(f"fastvq: interrupted{hint}", file=sys.stderr)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    return 0


@contextlib.contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """SIGTERM raises inside the block, so that nothing temporary is left behind."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
