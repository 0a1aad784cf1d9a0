"""Named ranges in the timelines of NVIDIA's profilers, in a domain of our own.

Where no such tool listens, or without the package ``nvtx``, they are nothing: a decorated function is the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

DOMAIN = "fastvq"

Function = TypeVar("Function", bound=Callable[..., Any])


class Range(Protocol):
    """A decorator, and a context that can be entered again and again."""

    def __call__(self, function: Function) -> Function: ...

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> bool | None: ...


class _Nothing:
    def __call__(self, function: Function) -> Function:
        return function

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _Listened:
    def __init__(self, name: str) -> None:
        self._range = nvtx.annotate(name, domain=DOMAIN)

    def __call__(self, function: Function) -> Function:
        annotated = self._range(function)

        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            # A compiler could not see through the range, and it would tell of the compilation alone.
            return (function if torch.compiler.is_compiling() else annotated)(*args, **kwargs)

        return inner  # type: ignore[return-value]

    def __enter__(self) -> object:
        return self._range.__enter__()

    def __exit__(self, *error: object) -> None:
        self._range.__exit__(*error)


@functools.cache
def annotate(name: str) -> Range:
    """The range of a name, around a block or every call of a function."""
    listens = nvtx is not None and isinstance(nvtx.get_domain(DOMAIN), nvtx.Domain)
    return _Listened(name) if listens else _Nothing()
