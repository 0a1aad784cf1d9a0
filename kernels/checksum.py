"""A checksum of a GPU's memory in which every position counts differently."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.kernels.launch import on_device

__all__ = ["Checksum"]

# Words that a program reads at a time, and in all.
_BLOCK = 1024
_CHUNK = 32 * _BLOCK


@triton.jit
def _checksum_kernel(chunks_ptr, total_ptr, BLOCK: tl.constexpr):
    """Adds one chunk's share: a row (address, words, bytes of a word: 8 or 1) of chunks.

    Each of BLOCK lanes takes every BLOCK-th word. A step loses nothing of the lane nor of the word, so that no change
    of a single word goes unnoticed.
    """
    chunk = tl.program_id(0).to(tl.int64)
    address = tl.load(chunks_ptr + 3 * chunk)
    count = tl.load(chunks_ptr + 3 * chunk + 1)
    wide = tl.load(chunks_ptr + 3 * chunk + 2) == 8
    local = tl.arange(0, BLOCK)  # [BLOCK]
    lanes = (chunk * BLOCK + local + 1).to(tl.uint64) * 0x9E3779B97F4A7C15  # [BLOCK]
    for start in range(0, count, BLOCK):
        offs = start + local  # [BLOCK]
        mask = offs < count  # [BLOCK]
        if wide:
            words = tl.load(address.to(tl.pointer_type(tl.uint64)) + offs, mask=mask, other=0)  # [BLOCK]
        else:
            words = tl.load(address.to(tl.pointer_type(tl.uint8)) + offs, mask=mask, other=0).to(tl.uint64)  # [BLOCK]
        lanes = (lanes ^ words) * 0xFF51AFD7ED558CCD
        lanes ^= lanes >> 32
    lanes *= 0xC4CEB9FE1A85EC53
    lanes ^= lanes >> 33
    # Sums of integers do not depend on their order.
    tl.atomic_add(total_ptr, tl.sum(lanes.to(tl.int64), axis=0))


class Checksum:
    """Computes the checksum of the blocks as they are when it is called, in one launch.

    Args:
        blocks: uint8 [bytes], contiguous, on one device; they must outlive this.
    """

    def __init__(self, blocks: list[Tensor]) -> None:
        rows = []
        for block in blocks:
            first, end = block.data_ptr(), block.data_ptr() + block.numel()
            # Whole words where they are aligned; single bytes before and after.
            left = min(first + -first % 8, end)
            right = max(end - end % 8, left)
            for start, stop, width in ((first, left, 1), (left, right, 8), (right, end, 1)):
                steps = range(start, stop, width * _CHUNK)
                rows.extend((at, min((stop - at) // width, _CHUNK), width) for at in steps)
        self._chunks = torch.from_numpy(np.array(rows, dtype=np.int64)).to(blocks[0].device)

    def __call__(self) -> int:
        total = self._chunks.new_zeros(1)
        with on_device(total.device):
            _checksum_kernel[(len(self._chunks),)](self._chunks, total, BLOCK=_BLOCK, num_warps=4)
        return int(total.item())
