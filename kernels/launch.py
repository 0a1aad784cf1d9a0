"""Where a kernel is launched, and what that device is."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Device", "cdiv", "hardware", "launch", "on_device"]

_MOST_COMPILED = 4096


class Device(NamedTuple):
    """Compute capability such as 90, and number of multiprocessors."""

    capability: int
    processors: int


class _Compiled(NamedTuple):
    """What Triton's own launch calls in the end, and with what: see `triton.runtime.jit.JITFunction.run`."""

    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    runtime: Any

    @classmethod
    def of(cls, kernel: Any, compiled: Any, given: int, options: dict[str, Any]) -> _Compiled:
        """``given``: how many arguments are no constants."""
        from triton import knobs

        constants = tuple(options[name] for name in kernel.arg_names[given:])
        return cls(compiled.run, compiled.function, compiled.packed_metadata, constants, knobs.runtime)


# By what Triton would compile anew for.
_compiled: dict[tuple[Any, ...], _Compiled] = {}


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
    device, pointers, joint = torch.cuda.current_device(), [], 0
    # Kernels live as long as their modules, and take long to hash.
    key: list[Any] = [id(kernel), device, numbers, *options.values()]
    for tensor in tensors:
        pointer = None
        if tensor is None:
            key.append(None)
        else:
            pointer = tensor.data_ptr()
            joint |= pointer
            key.append(tensor.dtype)
        pointers.append(pointer)
    if joint % 16:
        key += [pointer is None or pointer % 16 == 0 for pointer in pointers]
    found = _compiled.get(tuple(key))
    if found is None or _is_watched(found.runtime):
        found = _Compiled.of(kernel, kernel[grid](*tensors, *numbers, **options), len(tensors) + len(numbers), options)
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[tuple(key)] = found
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    found.run(
        *grid, stream, found.function, found.metadata, None, None, None, *pointers, *numbers, *found.constants
    )  # fmt: skip


def _is_watched(runtime: Any) -> bool:
    """Whether a profiler wants to hear of launches."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
