"""Progress bars on stderr: on a terminal as such, in a log file as a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

# Seconds between two lines of a log file.
_EVERY = 30.0
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class _Lines:
    """A stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def bar(title: str, *, show: bool, total: int | None = None, items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of tqdm: to update up to ``total``, or to iterate over ``items`` with. Notebooks have a terminal's."""
    # Only those who want bars wait for it.
    from tqdm import tqdm

    terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
    stream: Any = sys.stderr if terminal else _Lines(sys.stderr)
    often: dict[str, Any] = {} if terminal else {"mininterval": _EVERY, "maxinterval": _EVERY, "bar_format": _LINE}
    return tqdm(items, title, total=total, disable=not show, file=stream, **often, **options)
