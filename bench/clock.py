"""Seconds of a call, and of the GPU in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Timed(NamedTuple):
    """A call's result, the seconds until all of its work was done, and those of the device.

    A GPU's are those between two events around the call on the current stream; where it waits for the host they count
    as well. A CPU's are those of the call.
    """

    result: Any
    seconds: float
    device_seconds: float


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(run: Callable[..., Any], *arguments: Any, device: torch.device) -> Timed:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    synchronise(device)
    start = time.perf_counter()
    for event in events[:1]:
        event.record(torch.cuda.current_stream(device))
    result = run(*arguments)
    for event in events[1:]:
        event.record(torch.cuda.current_stream(device))
    synchronise(device)
    seconds = time.perf_counter() - start
    return Timed(result, seconds, events[0].elapsed_time(events[1]) / 1e3 if events else seconds)
