"""Named ranges in the timelines of NVIDIA's profilers: off unless asked for, and then the package ``nvtx`` is needed.

They are on from the start where the environment says ``FASTVQ_NVTX=1``.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from fastvq.errors import UnavailableError

DOMAIN = "fastvq"

_NOTHING = contextlib.nullcontext()
_wanted = os.environ.get("FASTVQ_NVTX", "0") not in ("", "0")
_annotate: Any = None


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """A range of that name around a block.

    Raises:
        UnavailableError: ranges are wanted and the package ``nvtx`` is not installed.
    """
    if not _wanted:
        return _NOTHING
    found: contextlib.AbstractContextManager[object] = _load()(name, domain=DOMAIN)
    return found


def switch(on: bool) -> None:
    """Ranges on or off, from now on and for the whole process.

    Raises:
        UnavailableError: the package ``nvtx`` is not installed; ranges stay off.
    """
    global _wanted
    if on:
        _load()
    _wanted = on


def _load() -> Any:
    global _annotate
    if _annotate is None:
        try:
            import nvtx
        except ImportError as error:
            raise UnavailableError(
                f"nvtx: ranges were asked for but the package is not installed ({error}); pip install nvtx, or unset"
                " FASTVQ_NVTX"
            ) from error
        _annotate = nvtx.annotate
    return _annotate
