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


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    device: torch.device,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    **options: Any,
) -> None:
    """``kernel[grid](*tensors, *numbers, **options)`` on a device, at a fraction of the time on the host.

    Triton binds, describes and looks up all arguments of every launch. Here numbers stand for themselves: whoever calls
    with the same ones again launches what was compiled.

    Args:
        options: the kernel's constants and what Triton takes besides, by name.
    """
    if device.type != "cuda":
        kernel[grid](*tensors, *numbers, **options)
    elif device.index in (None, torch.cuda.current_device()):
        _launch(kernel, grid, tensors, numbers, options)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, tensors, numbers, options)


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    """On the current device."""
    kinds = [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
    # Kernels live as long as their modules, and take long to hash.
    key = (id(kernel), torch.cuda.current_device(), numbers, *kinds, *options.values())
    found = _compiled.get(key)
    if found is not None:
        found[0][grid](*tensors, *numbers, *found[1])
        return
    compiled = kernel[grid](*tensors, *numbers, **options)
    constants = tuple(options[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
    if len(_compiled) >= _MOST_COMPILED:
        _compiled.clear()
    _compiled[key] = compiled, constants
