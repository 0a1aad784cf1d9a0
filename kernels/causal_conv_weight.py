"""Gradient of the masked causal convolution's weights on a GPU.

For every tap that is read, a product over positions of x, moved by the tap, and the gradient of the result. Positions
are split among programs, whose partial sums are added in a fixed order: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from fastvq.kernels.causal_conv_product import (
    Tiles,
    is_fused,
    kernel_precision,
    multiply,
    shared_budget,
)
from fastvq.kernels.causal_surroundings import ACTIVATION_KINDS, activated, nhwc, require_countable
from fastvq.kernels.elementary import elu_pair
from fastvq.kernels.launch import Device, cdiv, hardware, launch
from fastvq.kernels.taps import CHANNEL_MULTIPLE, read_taps
from fastvq.kernels.tuning import tuned

__all__ = ["backward_weight"]

_PAIR: tl.constexpr = tl.constexpr(2)


# Channels, columns and positions (of half types) of one tap's product, largest first; the last one is for float32
# without tensor cores.
WEIGHT_TILES = (
    Tiles(128, 256, 64, 8, 4),
    Tiles(128, 128, 64, 8, 4),
    Tiles(64, 128, 64, 4, 4),
    Tiles(64, 64, 16, 4, 2),
)


def weight_tiles(channels: int, columns: int, dtype: torch.dtype, precision: str, device: Device, signs: int) -> Tiles:
    """Tiles of one tap's product; ``signs`` is 2 when concat-ELU is computed on the way.

    Accumulators of both signs count as rows.
    """
    narrow_m = max(16, triton.next_power_of_2(channels))
    narrow_n = max(16, triton.next_power_of_2(columns))
    widest, large, small, tiles = WEIGHT_TILES
    plain = dtype == torch.float32 and precision == "ieee"
    if not plain:
        # Transposing blocks of float32 takes registers.
        tiles = small if dtype == torch.float32 else large
        wide = device.capability >= 90 and narrow_n >= widest.block_n
        tiles = widest if wide else tiles
        sizes = f"{dtype} m{channels} n{columns} signs{signs}"
        candidates = [widest, large, small][0 if wide else 1 if tiles == large else 2 :]
        tiles = tuned("causal_conv_weight", device.capability, sizes, candidates) or tiles
    block_m, block_n = min(tiles.block_m // signs, narrow_m), min(tiles.block_n, narrow_n)
    if plain:
        return tiles._replace(block_m=block_m, block_n=block_n)
    warps = 8 if signs * block_m * block_n >= 128 * 128 else 4
    block_k = 2 * tiles.block_k // dtype.itemsize
    stages = max(2, min(tiles.stages, shared_budget(device) // ((block_m + block_n) * 128)))
    return Tiles(block_m, block_n, block_k, warps, stages)


@triton.jit
def _weight_kernel(
    x_ptr, grad_ptr, partial_ptr, positions, height, width, channels, columns, span,
    KERNEL: tl.constexpr, ABOVE: tl.constexpr, LEFT: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [splits, taps, C', columns], each split over ``span`` positions; x and grad [positions, ...]."""
    blocks_n = tl.cdiv(columns, BLOCK_N)
    blocks = tl.cdiv(channels, BLOCK_M) * blocks_n
    tap = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    offs_m = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], channels
    offs_n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N], columns
    local = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    down = tap // KERNEL - ABOVE
    right = tap % KERNEL - LEFT
    offs_tap = (down * width + right) * channels
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, positions)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    for start in range(first, last, BLOCK_K):
        offs_k = start + local  # [BLOCK_K], positions
        col = offs_k % width  # [BLOCK_K]
        row = offs_k // width % height  # [BLOCK_K]
        # Both operands are masked, so that no gradient meets a zero of the padding: it may be infinite.
        mask_k = (offs_k < last) & (col + right >= 0) & (col + right < width) & (row + down >= 0)  # [BLOCK_K]
        offs_row = offs_k.to(tl.int64)[:, None]  # [BLOCK_K, 1]
        mask_x = mask_k[:, None] & (offs_m < channels)[None, :]  # [BLOCK_K, BLOCK_M]
        x_ptrs = x_ptr + offs_row * channels + (offs_tap + offs_m)[None, :]  # [BLOCK_K, BLOCK_M]
        a = tl.load(x_ptrs, mask=mask_x, other=0.0)  # [BLOCK_K, BLOCK_M]
        mask_grad = mask_k[:, None] & (offs_n < columns)[None, :]  # [BLOCK_K, BLOCK_N]
        grad_ptrs = grad_ptr + offs_row * columns + offs_n[None, :]  # [BLOCK_K, BLOCK_N]
        b = tl.load(grad_ptrs, mask=mask_grad, other=0.0)  # [BLOCK_K, BLOCK_N]
        if PROLOGUE == 0:
            acc = multiply(tl.trans(a), b, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        else:
            positive, negative = elu_pair(a.to(tl.float32), False)  # [BLOCK_K, BLOCK_M] each
            acc = multiply(tl.trans(positive.to(a.dtype)), b, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
            if PROLOGUE == _PAIR:
                other = multiply(tl.trans(negative.to(a.dtype)), b, other, PRECISION)  # [BLOCK_M, BLOCK_N]
    depth = channels * 2 if PROLOGUE == _PAIR else channels
    slot = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) + tap
    partial_ptrs = partial_ptr + (slot * depth + offs_m)[:, None] * columns + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    mask = (offs_m < channels)[:, None] & (offs_n < columns)[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(partial_ptrs, acc, mask=mask)
    if PROLOGUE == _PAIR:
        tl.store(partial_ptrs + channels * columns, other, mask=mask)


@torch.no_grad()
def backward_weight(
    grad: Tensor,
    x: Tensor,
    *,
    kernel_size: int,
    mask: str,
    form: str,
    activation: str | None = None,
    precision: str = "ieee",
    sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to weight [O, C', k, k] and bias [O] of `causal_conv.forward`; the same bits in every run.

    Args:
        grad: [B, O, H, W], gradient of the convolution's result, of x's dtype.
        x: [B, C, H, W].
        kernel_size: k.
        mask, form, activation, precision: as for `causal_conv.forward`.
        sums: [O], of grad over all positions, where they are known.
        dtype: of the gradients; x's by default. Sums are float32, or float64 for the bias.

    Returns:
        The two gradients; that of weights behind the mask is exactly 0.
    """
    taps = read_taps(kernel_size, mask, form)
    dtype = dtype or x.dtype
    kind = ACTIVATION_KINDS[activation]
    grad, x = nhwc(grad), nhwc(x)
    columns, channels = grad.shape[-1], x.shape[-1] * max(1, kind)
    weight = x.new_zeros((columns, channels, kernel_size**2), dtype=dtype)
    # As many terms as there are positions, in an order that PyTorch chooses: float64 makes it irrelevant.
    bias = (grad.sum((0, 1, 2), dtype=torch.float64) if sums is None else sums).to(dtype)
    if taps.count and x.numel() and columns:
        partial = _partial_sums(grad, x, taps.count, kind, kernel_size, taps.above, taps.left, precision)
        # [taps, signs, channels, O]: padded columns and channels go.
        total = partial.sum(0)[..., : channels // partial.shape[2], :columns]
        weight[:, :, : taps.count] = total.permute(3, 1, 2, 0).flatten(1, 2)
    return weight.view(columns, channels, kernel_size, kernel_size), bias


def _partial_sums(
    grad: Tensor, x: Tensor, taps: int, kind: int, kernel: int, above: int, left: int, precision: str
) -> Tensor:
    """float32 [splits, taps, signs, C, O], where channels and columns may be more than were given."""
    batch, height, width, columns = grad.shape
    positions = batch * height * width
    require_countable("x: expected positions", positions)
    device = hardware(x.device)
    tiles = weight_tiles(x.shape[-1], columns, x.dtype, precision, device, max(1, kind))
    repetitions = taps * cdiv(columns, tiles.block_n)
    if kind and not is_fused(kind, repetitions, x.dtype, precision, device):
        x, kind = activated(x, kind), 0
        tiles = weight_tiles(x.shape[-1], columns, x.dtype, precision, device, 1)
    grad = pad(grad, (0, -columns % CHANNEL_MULTIPLE))
    x = pad(x, (0, -x.shape[-1] % CHANNEL_MULTIPLE))
    channels, columns = x.shape[-1], grad.shape[-1]
    programs = taps * cdiv(channels, tiles.block_m) * cdiv(columns, tiles.block_n)
    span, splits = split_positions(positions, programs, tiles.block_k, device.processors)
    partial = x.new_empty((splits, taps, max(1, kind), channels, columns), dtype=torch.float32)
    launch(
        _weight_kernel, (programs, splits, 1), x.device,
        (x, grad, partial), (positions, height, width, channels, columns, span),
        KERNEL=kernel, ABOVE=above, LEFT=left, PROLOGUE=kind, PRECISION=kernel_precision(x, precision),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return partial


def split_positions(positions: int, programs: int, block: int, processors: int) -> tuple[int, int]:
    """Positions per split, a multiple of ``block``, and number of splits.

    Enough for four programs on each multiprocessor, so that the last ones to finish cost little; at least 16 blocks
    each, since every split writes float32 sums of its own.
    """
    blocks = cdiv(positions, block)
    splits = max(1, min(cdiv(4 * processors, programs), blocks // 16))
    span = cdiv(blocks, splits) * block
    return span, cdiv(positions, span)
