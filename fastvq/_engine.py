"""The compiled extension, loaded when first needed. No other module imports it.

The package works without the extension; what needs it calls `require`, which says why it is missing and how to build
it. Importing this module loads neither the extension nor PyTorch.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

from fastvq.errors import UnavailableError

# Raised together with the number in csrc/bindings.cpp when a signature changes: functions take addresses, so a binary
# that was built from other sources must not be called.
_INTERFACE = 10

_HOW_TO_BUILD = (
    "Build it with a C++17 compiler: run 'pip install -e .' in the source tree"
    " (with FASTVQ_REQUIRE_EXT=1 and -v it shows why a build fails)"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from fastvq import _ext
    except ImportError as error:
        return None, f"the compiled extension fastvq._ext cannot be imported ({error})"
    found = getattr(_ext, "INTERFACE", None)
    if found != _INTERFACE:
        return None, f"the compiled extension has interface {found}, this fastvq needs {_INTERFACE}: it is out of date"
    if _forked:
        extension: ModuleType = _ext
        extension.leave_thread_pool()
    return _ext, None


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True
    extension = _load()[0] if _load.cache_info().currsize else None
    if extension is not None:
        extension.leave_thread_pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    """Whether this process is a child of fork, where PyTorch waits for threads that only its parent has."""
    return _forked


def available() -> bool:
    """Whether the extension can be used."""
    return _load()[0] is not None


def why_unavailable() -> str | None:
    """Why the extension cannot be used and how to build it, or None when it can."""
    reason = _load()[1]
    return None if reason is None else f"{reason}. {_HOW_TO_BUILD}"


def require() -> ModuleType:
    """The extension.

    Raises:
        UnavailableError: it cannot be used; the message says why and how to build it.
    """
    module = _load()[0]
    if module is None:
        raise UnavailableError(why_unavailable())
    return module
