"""Argument checks shared by the public functions: every message names the argument, what came and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError

INTEGER_DTYPES = (
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_LARGEST = torch.iinfo(torch.int64).max
_LARGEST_FLOAT = torch.finfo(torch.float32).max
FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIDED = torch.strided


def require_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def require_shape(name: str, value: Tensor, expected: Sequence[int | str | None]) -> None:
    """Each entry of ``expected`` is a size, or a letter or None for any size."""
    fits = value.ndim == len(expected) and all(
        not isinstance(want, int) or have == want for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("?" if e is None else str(e) for e in expected)
        raise ArgumentError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")


def require_integer(name: str, value: object) -> Tensor:
    """An integer tensor as int64. What exceeds it (uint64 from 2^63) becomes the largest int64, which is no code.

    To be called before values are compared: -1 is 255 to a tensor of uint8.
    """
    tensor = require_tensor(name, value)
    if tensor.dtype not in INTEGER_DTYPES:
        raise ArgumentTypeError(f"{name}: expected an integer tensor, got {tensor.dtype}")
    if tensor.layout is not _STRIDED or tensor.is_nested:
        require_dense(name, tensor)
    wide = tensor.to(torch.int64)
    return wide if tensor.dtype != torch.uint64 else torch.where(wide < 0, _LARGEST, wide)


def require_dense(name: str, value: Tensor) -> None:
    """Elements lie in memory by strides: not sparse, nested or in a layout of a library."""
    if value.layout is not _STRIDED:
        raise ArgumentTypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.is_nested:
        raise ArgumentTypeError(f"{name}: expected a dense tensor, got a nested one")


def require_floating(name: str, value: Tensor) -> None:
    """Dense as well, and of a type that can be computed with."""
    if value.dtype not in FLOATING_DTYPES:
        expected = "a floating-point tensor"
        if value.dtype.is_floating_point:
            expected = "float64, float32, bfloat16 or float16"
        raise ArgumentTypeError(f"{name}: expected {expected}, got {value.dtype}")
    if value.layout is not _STRIDED or value.is_nested:
        require_dense(name, value)


def require_like(
    name: str, value: object, shape: Sequence[int | str], first: Tensor, of: str, *, any_dtype: bool = False
) -> None:
    """A dense floating-point tensor of a shape, on the device of another one and, outside autocast, of its dtype.

    Args:
        first, of: the other tensor, which has been checked, and its name.
        any_dtype: the dtype may be another.
    """
    value = require_tensor(name, value)
    if value.dtype != first.dtype or value.layout is not _STRIDED or value.is_nested:
        require_floating(name, value)
    if value.shape != shape:
        require_shape(name, value, shape)
    if value.device != first.device:
        raise ArgumentError(f"{name}: expected device {first.device} as for {of}, got {value.device}")
    if value.dtype != first.dtype and not any_dtype and not torch.is_autocast_enabled(first.device.type):
        raise ArgumentTypeError(f"{name}: expected {first.dtype} as for {of}, got {value.dtype}")


def require_range(name: str, value: Tensor, count: int) -> None:
    """Values must lie in [0, count). Reads the tensor, so on a GPU it waits for it; vmap has none to read."""
    if value.numel() == 0 or _is_batched(value):
        return
    low, high = (int(v) for v in torch.aminmax(value))
    if low < 0 or high >= count:
        bad = low if low < 0 else high
        raise ArgumentError(f"{name}: values must lie in 0..{count - 1}, got {bad}")


def _is_batched(value: Tensor) -> bool:
    """Whether vmap stands for many values here."""
    wrapper = torch._C._functorch
    while wrapper.is_functorch_wrapped_tensor(value):
        if wrapper.is_batchedtensor(value):
            return True
        value = wrapper.get_unwrapped(value)
    return False


def require_codes(name: str, codes: object, shape: Sequence[int | str | None], num_codes: int) -> Tensor:
    """A checked int64 tensor of codes. The range is checked on the CPU only, where reading it is free of waiting."""
    tensor = require_integer(name, codes)
    require_shape(name, tensor, shape)
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        require_range(name, tensor, num_codes)
    return tensor


def require_mask(name: str, value: object, shape: Sequence[int | str | None], meaning: str = "") -> Tensor:
    """A mask; ``meaning``, what True says, is for the message."""
    mask = require_tensor(name, value)
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(f"{name}: expected bool{meaning and f' (True {meaning})'}, got {mask.dtype}")
    require_shape(name, mask, shape)
    return mask


def require_positive_int(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> int:
    """An integer, of NumPy as well, as one of Python."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    value = int(value)
    if value < minimum:
        raise ArgumentError(f"{name}: must be at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ArgumentError(f"{name}: must be at most {maximum}, got {value}")
    return value


def require_seed(name: str, value: object, bits: int = 63) -> int:
    """A seed of so many bits; those of 63 fit a signed and an unsigned 64-bit integer alike."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if not 0 <= value < 1 << bits:
        raise ArgumentError(f"{name}: must lie in 0..2**{bits}-1, got {value}")
    return value


def wrapped_seed(name: str, value: object, expected: str = "an int") -> int:
    """A seed of any size, of Python or NumPy, modulo 2**64."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value) % (1 << 64)  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentTypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}") from None


def require_bool(name: str, value: object, *, optional: bool = False) -> None:
    if not isinstance(value, bool) and not (optional and value is None):
        expected = "a bool or None" if optional else "a bool"
        raise ArgumentTypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")


def require_real(name: str, value: Any) -> float:
    """A number of any size, NaN included; what exceeds all floats becomes infinite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value // abs(value))


def require_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    """A number that is finite as float32 and within bounds, which ``least`` and ``most`` may reach, the others not."""
    number = require_real(name, value)
    if abs(number) <= _LARGEST_FLOAT and least <= number <= most and above < number < below:
        return number
    low, high = max(least, above), min(most, below)
    if math.isfinite(low) and math.isfinite(high):
        wanted = f"lie in {'(' if above == low else '['}{low:g}, {high:g}{')' if below == high else ']'}"
    elif low == least == 0:
        wanted = "not be negative, and finite"
    else:
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        words = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        wanted = f"be {' and '.join([*words, 'finite'])}"
    raise ArgumentError(f"{name}: must {wanted}, got {value!r}")


def require_odd(name: str, value: object, minimum: int, maximum: int) -> None:
    if require_positive_int(name, value, minimum, maximum) % 2 == 0:
        raise ArgumentError(f"{name}: must be odd, got {value}")


def require_tuple(name: str, value: object) -> None:
    if not isinstance(value, tuple):
        raise ArgumentTypeError(f"{name}: expected a tuple, got {value!r}")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
