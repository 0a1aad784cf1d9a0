"""Where a kernel is launched, and what that device is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Device", "Form", "Launcher", "cdiv", "form", "hardware", "launch", "on_device"]

# Of `launch`.
_launchers: dict[tuple[Any, ...], Launcher] = {}
_MOST_LAUNCHERS = 4096


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


class Form(NamedTuple):
    """All about a tensor that a launch depends on, but for where it lies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def form(tensor: Tensor) -> Form:
    return Form(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class Launcher:
    """Launches of a kernel that differ in where their tensors lie, and in nothing else that Triton looks at.

    It is asked once which compiled form they need, since that takes it longer than many a kernel runs.

    Args:
        kernel: its parameters are pointers, then numbers, then constants.
        grid: numbers of programs.
        numbers: between pointers and constants.
        options: constants, and launch options such as ``num_warps``.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int | float, ...], options: Mapping[str, Any]
    ) -> None:
        self._kernel, self._numbers, self._options = kernel, numbers, options
        # What is compiled asks for three.
        self._grid = (*grid, 1, 1)[:3]
        self._launch: Callable[..., object] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        """Tensors of the same types in every call, None in the same places, on the current device."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = not any(address is not None and address & 15 for address in addresses)
        if self._launch is not None and aligned:
            self._launch(*addresses, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._options)
        # The interpreter compiles nothing.
        if compiled is not None and aligned:
            constants = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._rest = *self._numbers, *(self._options[name] for name in constants)
            self._launch = compiled[self._grid]


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    device: torch.device,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    **options: Any,
) -> None:
    """``kernel[grid](*tensors, *numbers, **options)`` on a device, by the `Launcher` that serves for these.

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
    types = [None if tensor is None else tensor.dtype for tensor in tensors]
    # Kernels live as long as their modules, and take long to hash.
    key = (id(kernel), torch.cuda.current_device(), grid, numbers, *types, *options.values())
    found = _launchers.get(key)
    if found is None:
        if len(_launchers) >= _MOST_LAUNCHERS:
            _launchers.clear()
        found = _launchers[key] = Launcher(kernel, grid, numbers, options)
    found(*tensors)
