"""Where a kernel is launched, and what that device is."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

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


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
