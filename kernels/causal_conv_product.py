"""Masked causal convolution on a GPU, as a matrix product over the taps that are read.

In raster order the taps a causal kernel reads are the first ones of its k x k: the rows above whole, then the current
row up to the mask. So tap t lies at row t // k - above and column t % k - left for t < count, and one pipelined loop
runs over (tap, chunk of channels); weights behind the mask are not even copied. Rows of the product are positions of a
channels-last image: a tap moves all addresses of a block by the same amount, and only the grid's borders need a mask.

The gradient with respect to the input is the same product with the taps' offsets negated. Where two columns of the
product meet in one output (gate; derivative of concat-ELU) a program holds both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from fastvq.kernels.causal_surroundings import CONCAT_ELU, activated, finish, require_countable
from fastvq.kernels.elementary import elu_pair
from fastvq.kernels.launch import Device, cdiv, hardware, launch
from fastvq.kernels.taps import CHANNEL_MULTIPLE, Taps
from fastvq.kernels.tuning import tuned

# An ELU costs about as much on its own, reading and writing each value once, as it does in this many repetitions inside
# a product; a product repeats it for every tap and block of columns.
_FUSED_REPETITIONS = 4


class Tiles(NamedTuple):
    """Block sizes of a product (rows, columns, depth), warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# Largest first; of the depth that half types have. The last one is for float32 without tensor cores: its products and
# operands live in registers.
PRODUCT_TILES = (
    Tiles(128, 256, 64, 8, 4),
    Tiles(128, 128, 64, 8, 4),
    Tiles(128, 64, 64, 4, 4),
    Tiles(64, 64, 64, 4, 4),
    Tiles(32, 32, 64, 4, 4),
    Tiles(64, 64, 16, 4, 2),
)


def shared_budget(device: Device) -> int:
    """Bytes that the stages of a pipeline may take."""
    return (208 if device.capability >= 90 else 144) * 1024


def is_fused(kind: int, repetitions: int, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Whether x is activated inside a product that would do so ``repetitions`` times.

    Not without tensor cores, where registers are scarce; nor for concat-ELU on Blackwell, where Triton 3.6 makes an
    empty kernel of two products into one accumulator.
    """
    if (dtype == torch.float32 and precision == "ieee") or (kind == 2 and device.capability >= 100):
        return False
    return repetitions <= _FUSED_REPETITIONS


def product_tiles(
    rows: int, columns: int, depth: int, dtype: torch.dtype, precision: str, device: Device, signs: int = 1
) -> Tiles:
    """Tiles of a product [rows, depth] x [depth, columns]; ``signs`` is 2 when one block of x meets two of weights.

    The largest tile that still gives three quarters of the multiprocessors a program: large tiles need the fewest bytes
    per product, and with 256 columns x is read once for every tap.
    """
    narrow = max(16, triton.next_power_of_2(columns))
    *large, tiles = PRODUCT_TILES
    if dtype == torch.float32 and precision == "ieee":
        return tiles._replace(block_n=min(tiles.block_n // signs, narrow))
    fitting = [tiles for tiles in large[device.capability < 90 :] if tiles.block_n < 2 * narrow] or large[-1:]
    for tiles in fitting:
        programs = cdiv(rows, tiles.block_m) * cdiv(columns, tiles.block_n)
        if 4 * programs >= 3 * device.processors:
            break
    sizes = f"{dtype} m{triton.next_power_of_2(rows)} n{columns} k{depth} signs{signs}"
    tiles = tuned("causal_conv_product", device.capability, sizes, fitting) or tiles
    item, block_n = dtype.itemsize, min(tiles.block_n, narrow)
    # 128 bytes of depth fill a swizzled line of shared memory.
    block_k = min(2 * tiles.block_k // item // signs, max(16, triton.next_power_of_2(depth)))
    stage = (tiles.block_m + signs * block_n) * block_k * item
    stages = max(2, min(tiles.stages, shared_budget(device) // stage))
    return tiles._replace(block_n=block_n, block_k=block_k, stages=stages)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for blocks acc [M, N], a [M, K] and b [K, N].

    PRECISION may also be ``interpreted``: Triton's interpreter multiplies bfloat16 as integers. Without tensor cores
    (``ieee``) every block of depth gets a sum of its own before it is added: one chain over all of the depth errs by
    two to four times as much.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # Of no effect but one, on float32: a product that has this option is not merged with the addition.
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=a.shape[1])  # [M, N]
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")  # [M, N]
    return tl.dot(a, b, acc, input_precision=PRECISION)  # [M, N]


@triton.jit
def _add_products(acc, a, weight_ptrs, mask_k, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """acc [M, N] + a b^T for blocks a [M, K] and b [N, K], b at ``weight_ptrs``."""
    b = tl.load(weight_ptrs) if EVEN else tl.load(weight_ptrs, mask=mask_k[None, :], other=0.0)  # [N, K]
    return multiply(a, tl.trans(b), acc, PRECISION)  # [M, N]


@triton.jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr,
    positions, height, width, channels, columns,
    KERNEL: tl.constexpr, ABOVE: tl.constexpr, LEFT: tl.constexpr, TAPS: tl.constexpr, REVERSE: tl.constexpr,
    PROLOGUE: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr, SAMPLE_CONTEXT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [positions, columns].

    x [images, height, width, channels]; weight [TAPS, N, K], where K is ``channels``, or twice as many for concat-ELU,
    and N is ``columns``, or twice as many with a gate or the derivative of concat-ELU (at ``given_ptr``).
    """
    PAIR: tl.constexpr = GATE or DERIVATIVE == CONCAT_ELU
    blocks = tl.cdiv(columns, BLOCK_N)
    offs_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first_n = tl.program_id(0) % blocks * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask_m = offs_m < positions  # [BLOCK_M]
    col = offs_m % width  # [BLOCK_M]
    line = offs_m // width  # [BLOCK_M]
    row = line % height  # [BLOCK_M]
    image = (line // height).to(tl.int64)  # [BLOCK_M]
    x_ptrs = x_ptr + ((image * height + row) * width + col) * channels  # [BLOCK_M]
    depth = channels * 2 if PROLOGUE == CONCAT_ELU else channels
    total = columns * 2 if PAIR else columns
    # Columns past the end repeat the last one and are not stored, which spares a mask.
    offs_column = tl.minimum(offs_n, columns - 1).to(tl.int64)  # [BLOCK_N]
    weight_ptrs = weight_ptr + offs_column[:, None] * depth + offs_k[None, :]  # [BLOCK_N, BLOCK_K]
    second = columns * depth

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    for step in range(TAPS * CHUNKS):
        tap = step // CHUNKS
        down = ABOVE - tap // KERNEL if REVERSE else tap // KERNEL - ABOVE
        right = LEFT - tap % KERNEL if REVERSE else tap % KERNEL - LEFT
        mask_tap = mask_m & (col + right >= 0) & (col + right < width)  # [BLOCK_M]
        mask_tap = mask_tap & (row + down < height) if REVERSE else mask_tap & (row + down >= 0)
        start = step % CHUNKS * BLOCK_K
        mask_k = offs_k < channels - start  # [BLOCK_K]
        offs_tap = (down * width + right) * channels + start
        mask_a = mask_tap[:, None] if EVEN else mask_tap[:, None] & mask_k[None, :]  # [BLOCK_M, 1 or BLOCK_K]
        a = tl.load(x_ptrs[:, None] + (offs_tap + offs_k)[None, :], mask=mask_a, other=0.0)  # [BLOCK_M, BLOCK_K]
        tap_ptrs = weight_ptrs + (tap * total * depth + start)  # [BLOCK_N, BLOCK_K]
        if PROLOGUE == 0:
            acc = _add_products(acc, a, tap_ptrs, mask_k, EVEN, PRECISION)  # [BLOCK_M, BLOCK_N]
            if PAIR:
                other = _add_products(other, a, tap_ptrs + second, mask_k, EVEN, PRECISION)
        else:
            # Rounded to 11 bits at most right after: see is_fused.
            positive, negative = elu_pair(a.to(tl.float32), False)  # [BLOCK_M, BLOCK_K] each
            positive = positive.to(a.dtype)
            acc = _add_products(acc, positive, tap_ptrs, mask_k, EVEN, PRECISION)  # [BLOCK_M, BLOCK_N]
            if PAIR:
                other = _add_products(other, positive, tap_ptrs + second, mask_k, EVEN, PRECISION)
            if PROLOGUE == CONCAT_ELU:
                negative = negative.to(a.dtype)
                acc = _add_products(acc, negative, tap_ptrs + channels, mask_k, EVEN, PRECISION)
                if PAIR:
                    other = _add_products(other, negative, tap_ptrs + channels + second, mask_k, EVEN, PRECISION)

    finish(
        acc, other, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr, None,
        offs_m, image, first_n, positions, columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
    )  # fmt: skip


def convolve(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    taps: Taps,
    *,
    precision: str,
    kind: int = 0,
    reverse: bool = False,
    gate: bool = False,
    derivative: int = 0,
    bias: Tensor | None = None,
    context: Tensor | None = None,
    sample_context: bool = False,
    residual: Tensor | None = None,
    given: Tensor | None = None,
    pre_gate: Tensor | None = None,
) -> None:
    """Fills out [B, H, W, N] from x [B, H, W, K] and packed weights; see `_conv_kernel`."""
    if out.numel() == 0:
        return
    batch, height, width, columns = out.shape
    positions = batch * height * width
    require_countable("x: expected positions", positions)
    require_countable("weight: expected elements", weight.numel())
    device = hardware(x.device)
    half = 2 if gate or derivative == 2 else 1

    def choose(kind: int, channels: int) -> Tiles:
        return product_tiles(positions, columns * half, channels, x.dtype, precision, device, max(1, kind))

    tiles = choose(kind, x.shape[-1])
    repetitions = taps.count * cdiv(columns * half, tiles.block_n)
    if kind and not is_fused(kind, repetitions, x.dtype, precision, device):
        x, kind = activated(x, kind), 0
        tiles = choose(kind, x.shape[-1])
    short = -x.shape[-1] % CHANNEL_MULTIPLE
    if short:
        x = pad(x, (0, short))
        weight = pad(weight.unflatten(2, (max(1, kind), -1)), (0, short)).flatten(2)
    channels = x.shape[-1]
    block_n = max(16, tiles.block_n // half)
    launch(
        _conv_kernel, (cdiv(positions, tiles.block_m) * cdiv(columns, block_n), 1, 1), x.device,
        (x, weight, bias, context, residual, given, out, pre_gate), (positions, height, width, channels, columns),
        KERNEL=taps.kernel, ABOVE=taps.above, LEFT=taps.left, TAPS=taps.count, REVERSE=reverse, PROLOGUE=kind,
        GATE=gate, DERIVATIVE=derivative, SAMPLE_CONTEXT=sample_context, PRECISION=kernel_precision(x, precision),
        BLOCK_M=tiles.block_m, BLOCK_N=block_n, BLOCK_K=tiles.block_k, CHUNKS=cdiv(channels, tiles.block_k),
        EVEN=channels % tiles.block_k == 0, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def kernel_precision(x: Tensor, precision: str) -> str:
    return "interpreted" if x.device.type == "cpu" and x.dtype == torch.bfloat16 else precision
