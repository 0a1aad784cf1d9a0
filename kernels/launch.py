"""Where a kernel is launched, and what that device is."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Device", "cdiv", "hardware", "launch", "on_device"]

# Compiled kernels and the values of their constants, by what Triton would compile anew for.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST_COMPILED = 4096


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


def cdiv(number: int, by: int) -> int:
    """Rounded up. Triton's own, which kernels may call too, takes as long as a launch."""
    return -(-number // by)


def launch(kernel: Any, grid: tuple[int, int, int], device: torch.device, *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on a device, at a fraction of the time on the host.

    Triton binds, describes and looks up all arguments of every launch. Here sizes stand for themselves: whoever calls
    with the same ones again launches what was compiled.

    Args:
        args: tensors, None and whole numbers, for the kernel's first parameters.
        options: its constants and what Triton takes besides, by name.
    """
    if device.type != "cuda":
        kernel[grid](*args, **options)
        return
    if device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            _launch(kernel, grid, args, options)
    else:
        _launch(kernel, grid, args, options)


def _launch(kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """On the current device."""
    kinds = [(arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg for arg in args]
    key = (kernel, torch.cuda.current_device(), *kinds, *options.values())
    found = _compiled.get(key)
    if found is not None:
        found[0][grid](*args, *found[1])
        return
    compiled = kernel[grid](*args, **options)
    constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
    if len(_compiled) >= _MOST_COMPILED:
        _compiled.clear()
    _compiled[key] = compiled, constants
