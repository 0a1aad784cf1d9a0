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


# Of a GPU's clock, at most; `torch.cuda._sleep` counts in them.
_CYCLES_PER_SECOND = 2e9
_LONGEST_SLEEP = 0.25


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the device alone in a call: without those in which a GPU would wait for the host to start kernels.

    The GPU sleeps until the host has enqueued the whole call, which the call before has shown the time of. Where the
    call itself waits for the GPU, or its kernels do not fit into the queue, what it waits counts.
    """
    if device.type != "cuda":
        return clock(run, device=device).seconds
    synchronise(device)
    start = time.perf_counter()
    run()
    enqueued = time.perf_counter() - start
    synchronise(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(int(_CYCLES_PER_SECOND * min(2 * enqueued + 1e-4, _LONGEST_SLEEP)))
    events[0].record(torch.cuda.current_stream(device))
    run()
    events[1].record(torch.cuda.current_stream(device))
    synchronise(device)
    return events[0].elapsed_time(events[1]) / 1e3


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
