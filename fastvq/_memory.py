"""Addresses of tensors and arrays for compiled code, which reads and writes what it is told.

Every address goes through here. A mismatch is a mistake of this package and no argument's fault, hence AssertionError.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")


def address(name: str, tensor: Tensor, dtype: torch.dtype, count: int, device: torch.device = _CPU) -> int:
    """Address of ``count`` elements that lie one after the other.

    Raises:
        AssertionError: the tensor has another type, number of elements or device, or gaps.
    """
    if (
        tensor.dtype is not dtype
        or tensor.numel() != count
        or not tensor.is_contiguous()
        or not _lies_on(tensor, device)
    ):
        raise AssertionError(_mismatch(name, tensor, f"{dtype} {count} elements without gaps on {device}"))
    return tensor.data_ptr()


def strided_address(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device = _CPU
) -> int:
    """Address of the first of the vectors along the last axis, whose elements lie one after the other.

    Raises:
        AssertionError: the tensor has another type, shape or device, or gaps within a vector.
    """
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or (shape[-1] > 1 and tensor.stride(-1) != 1)
        or not _lies_on(tensor, device)
    ):
        raise AssertionError(_mismatch(name, tensor, f"{dtype} {list(shape)} without gaps along its end on {device}"))
    return tensor.data_ptr()


def array_address(name: str, array: np.ndarray, dtype: type[np.generic] | np.dtype, count: int) -> int:
    """`address` of a NumPy array."""
    if array.dtype != dtype or array.size != count or not array.flags.c_contiguous:
        raise AssertionError(
            f"{name}: expected {np.dtype(dtype)} {count} elements without gaps,"
            f" got {array.dtype} {list(array.shape)} of strides {array.strides}"
        )
    return array.ctypes.data


def _lies_on(tensor: Tensor, device: torch.device) -> bool:
    # A device without index is the current one of its type, which only a tensor made there can tell.
    there = tensor.device
    return there == device or (there.type == device.type and device.index is None)


def _mismatch(name: str, tensor: Tensor, expected: str) -> str:
    return (
        f"{name}: expected {expected}, got {tensor.dtype} {list(tensor.shape)} of strides {list(tensor.stride())}"
        f" on {tensor.device}"
    )
