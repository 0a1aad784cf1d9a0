"""Where a kernel is launched, and what that device is."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch

__all__ = ["Device", "hardware", "on_device"]


class Device(NamedTuple):
    """Compute capability such as 90, and number of multiprocessors."""

    capability: int
    processors: int


@functools.cache
def hardware(device: torch.device) -> Device:
    """The device's; where there is no GPU the interpreter runs what Hopper would, two programs wide."""
    if device.type != "cuda":
        return Device(90, 2)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels, events and streams are the current device's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
