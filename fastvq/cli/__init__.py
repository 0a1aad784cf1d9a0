"""The ``fastvq`` command. Parsing and help import nothing heavy; each command imports what it needs when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from fastvq.cli.names import as_typed
from fastvq.cli.parser import build_parser
from fastvq.errors import FastvqError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 a mistake or a failure, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    module, _, function = arguments.handler.partition(":")
    try:
        getattr(importlib.import_module(module), function)(arguments)
    except BrokenPipeError:
        # Whoever read our output has left; closing stdout quietly keeps the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FastvqError, OSError) as error:
        if arguments.debug:
            raise
        text = as_typed(str(error), arguments.command, arguments, arguments.options)
        print(f"fastvq: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; run the same command with --resume to go on" if hasattr(arguments, "resume") else ""
        print(f"fastvq: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0
