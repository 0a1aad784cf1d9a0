"""Noticing that tensors have changed, also where their version counters do not say so."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastvq import _engine
from fastvq._memory import address, array_address
from fastvq.ops.dispatch import why_no_triton


def contents_of(module: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """A module and all inside it, and their parameters and buffers; what is shared comes once for each place.

    nn.Module's own iterators would take longer than reading a small model's weights.
    """
    modules: list[nn.Module | None] = [module]
    tensors: list[Tensor | None] = []
    for part in modules:
        if part is None:
            continue
        if inner := part._modules:
            modules.extend(inner.values())
        if parameters := part._parameters:
            tensors.extend(parameters.values())
        if buffers := part._buffers:
            tensors.extend(buffers.values())
    return [found for found in modules if found is not None], [found for found in tensors if found is not None]


class Snapshot:
    """Where tensors lie in memory, and a checksum of what is there.

    Operations on ``tensor.data``, those on tensors made in inference mode and those of NumPy leave no trace but the
    values. The memory is kept alive, so that an address cannot come to belong to another tensor.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._layout = _layout(tensors)
        blocks: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() and not tensor.is_meta:
                blocks.setdefault(tensor.device, []).append(_block(tensor))
        self._blocks = blocks
        self._readers = [_reader(device, found) for device, found in blocks.items()]
        self._checksums = self._read()

    def matches(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors, with the values that they had."""
        return _layout(tensors) == self._layout and self._read() == self._checksums

    def _read(self) -> list[int]:
        return [reader() for reader in self._readers]


def _layout(tensors: list[Tensor]) -> list[object]:
    return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def _block(tensor: Tensor) -> Tensor:
    """The bytes from a tensor's first element to its last, in the order of memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((last + 1,), (1,)).view(torch.uint8)


def _reader(device: torch.device, blocks: list[Tensor]) -> Callable[[], int]:
    """What computes the checksum of blocks on one device, anew at every call."""
    if device.type == "cpu" and _engine.available():
        checksum = _engine.require().checksum
        sizes = [block.numel() for block in blocks]
        places = [address("block", block, torch.uint8, size) for block, size in zip(blocks, sizes, strict=True)]
        table = np.array([places, sizes], dtype=np.int64).T.copy()
        return lambda: checksum(array_address("table", table, np.int64, 2 * len(table)), len(table))
    if device.type == "cuda" and why_no_triton() is None:
        from fastvq.kernels.checksum import Checksum

        return Checksum(blocks)
    return lambda: _crc(blocks)


def _crc(blocks: list[Tensor]) -> int:
    value = 0
    for block in blocks:
        value = zlib.crc32(block.cpu().numpy().data, value)
    return value
