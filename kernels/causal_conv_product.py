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

from fastvq.errors import ArgumentError
from fastvq.kernels.launch import Device, hardware, on_device
from fastvq.kernels.taps import Taps

ACTIVATION_KINDS: dict[str | None, int] = {None: 0, "elu": 1, "concat_elu": 2}
_ELU: tl.constexpr = tl.constexpr(1)
_CONCAT_ELU: tl.constexpr = tl.constexpr(2)

# Of a row, that what follows the product handles at a time: more would not fit in registers.
_FINISHED_BITS: tl.constexpr = tl.constexpr(1024)

# An ELU costs about as much on its own, reading and writing each value once, as it does in this many repetitions inside
# a product; a product repeats it for every tap and block of columns.
_FUSED_REPETITIONS = 4

# Rows of channels are copied 16 bytes at a time only where Triton knows their addresses to be multiples of that.
CHANNEL_MULTIPLE = 16


class Tiles(NamedTuple):
    """Block sizes of a product (rows, columns, depth), warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


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
    if dtype == torch.float32 and precision == "ieee":
        # No tensor cores: products and operands live in registers.
        return Tiles(64, min(32 if signs == 2 else 64, narrow), 16, 4, 2)
    item = dtype.itemsize
    sizes = [(128, 128, 8), (128, 64, 4), (64, 64, 4), (32, 32, 4)]
    if device.capability >= 90:
        sizes.insert(0, (128, 256, 8))
    for block_m, block_n, warps in sizes:  # noqa: B007
        programs = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
        if block_n < 2 * narrow and 4 * programs >= 3 * device.processors:
            break
    block_n = min(block_n, narrow)
    # 128 bytes of depth fill a swizzled line of shared memory.
    block_k = min(128 // item // signs, max(16, triton.next_power_of_2(depth)))
    stage = (block_m + signs * block_n) * block_k * item
    budget = (208 if device.capability >= 90 else 144) * 1024
    return Tiles(block_m, block_n, block_k, warps, max(2, min(4, budget // stage)))


@triton.jit
def expm1_negative(x, PRECISE: tl.constexpr):
    """exp(x) - 1 for x <= 0; PRECISE keeps float32's relative error near zero, where the difference loses it."""
    value = tl.exp(x) - 1
    if PRECISE:
        series = 1 + x * (1 / 7) * (1 + x * 0.125)
        series = 1 + x * 0.25 * (1 + x * 0.2 * (1 + x * (1 / 6) * series))
        series = x * (1 + x * 0.5 * (1 + x * (1 / 3) * series))
        value = tl.where(x > -0.5, series, value)
    return value


@triton.jit
def elu_pair(x, PRECISE: tl.constexpr):
    """elu(x) and elu(-x), which share their exponential."""
    below = expm1_negative(-tl.abs(x), PRECISE)
    return tl.where(x > 0, x, below), tl.where(x < 0, -x, below)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, where PRECISION may also be ``interpreted``: Triton's interpreter multiplies bfloat16 as integers."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _add_products(acc, a, weights, inside, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b^T for a block b [N, K] of weights."""
    b = tl.load(weights) if EVEN else tl.load(weights, mask=inside[None, :], other=0.0)
    return multiply(a, tl.trans(b), acc, PRECISION)


@triton.jit
def _halves(block):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _finish(
    acc, other, bias, context, residual, given, out, pre_gate, m, image, n_first, positions, columns,
    PAIR: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr, SAMPLE_CONTEXT: tl.constexpr,
):  # fmt: skip
    """What follows the product, for columns ``n_first`` onwards."""
    if acc.shape[1] * out.dtype.element_ty.primitive_bitwidth > _FINISHED_BITS:
        left, right = _halves(acc)
        other_left, other_right = _halves(other) if PAIR else (left, right)
        _finish(
            left, other_left, bias, context, residual, given, out, pre_gate, m, image, n_first, positions,
            columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
        )  # fmt: skip
        _finish(
            right, other_right, bias, context, residual, given, out, pre_gate, m, image, n_first + acc.shape[1] // 2,
            positions, columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
        )  # fmt: skip
    else:
        n = n_first + tl.arange(0, acc.shape[1])
        total = columns * 2 if PAIR else columns
        stored = (m < positions)[:, None] & (n < columns)[None, :]
        rows = m.to(tl.int64)[:, None]
        if bias is not None:
            acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
            if PAIR:
                other += tl.load(bias + columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        if context is not None:
            source = image[:, None] if SAMPLE_CONTEXT else rows
            places = context + source * total + n[None, :]
            acc += tl.load(places, mask=stored, other=0.0).to(tl.float32)
            if PAIR:
                other += tl.load(places + columns, mask=stored, other=0.0).to(tl.float32)
        if pre_gate is not None:
            places = pre_gate + rows * total + n[None, :]
            tl.store(places, acc, mask=stored)
            tl.store(places + columns, other, mask=stored)
        if GATE:
            acc = acc * tl.sigmoid(other)
        if DERIVATIVE != 0:
            value = tl.load(given + rows * columns + n[None, :], mask=stored, other=0.0).to(tl.float32)
            slope = tl.exp(-tl.abs(value))
            acc *= tl.where(value > 0, 1.0, slope)
            if DERIVATIVE == _CONCAT_ELU:
                acc -= other * tl.where(value < 0, 1.0, slope)
        places = rows * columns + n[None, :]
        if residual is not None:
            acc += tl.load(residual + places, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + places, acc, mask=stored)


@triton.jit
def _conv_kernel(
    x, weight, bias, context, residual, given, out, pre_gate,
    positions, height, width, first_row, out_rows, channels, columns,
    KERNEL: tl.constexpr, ABOVE: tl.constexpr, LEFT: tl.constexpr, TAPS: tl.constexpr, REVERSE: tl.constexpr,
    PROLOGUE: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr, SAMPLE_CONTEXT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [positions, columns], for rows ``first_row`` onwards of every image.

    x [images, height, width, channels]; weight [TAPS, N, K], where K is ``channels``, or twice as many for concat-ELU,
    and N is ``columns``, or twice as many with a gate or the derivative of concat-ELU (at ``given``).
    """
    PAIR: tl.constexpr = GATE or DERIVATIVE == _CONCAT_ELU
    blocks = tl.cdiv(columns, BLOCK_N)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n_first = tl.program_id(0) % blocks * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = m < positions
    col = m % width
    line = m // width
    row = line % out_rows + first_row
    image = (line // out_rows).to(tl.int64)
    x_rows = x + ((image * height + row) * width + col) * channels  # [BLOCK_M]
    depth = channels * 2 if PROLOGUE == _CONCAT_ELU else channels
    total = columns * 2 if PAIR else columns
    # Columns past the end repeat the last one and are not stored, which spares a mask.
    weights = weight + tl.minimum(n, columns - 1).to(tl.int64)[:, None] * depth + k[None, :]  # [BLOCK_N, BLOCK_K]
    second = columns * depth

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(TAPS * CHUNKS):
        tap = step // CHUNKS
        down = ABOVE - tap // KERNEL if REVERSE else tap // KERNEL - ABOVE
        right = LEFT - tap % KERNEL if REVERSE else tap % KERNEL - LEFT
        there = inside & (col + right >= 0) & (col + right < width)
        there = there & (row + down < height) if REVERSE else there & (row + down >= 0)
        start = step % CHUNKS * BLOCK_K
        held = k < channels - start
        place = (down * width + right) * channels + start
        if EVEN:
            a = tl.load(x_rows[:, None] + (place + k)[None, :], mask=there[:, None], other=0.0)
        else:
            a = tl.load(x_rows[:, None] + (place + k)[None, :], mask=there[:, None] & held[None, :], other=0.0)
        b = weights + (tap * total * depth + start)
        if PROLOGUE == 0:
            acc = _add_products(acc, a, b, held, EVEN, PRECISION)
            if PAIR:
                other = _add_products(other, a, b + second, held, EVEN, PRECISION)
        else:
            # Rounded to 11 bits at most right after: see is_fused.
            positive, negative = elu_pair(a.to(tl.float32), False)
            positive = positive.to(a.dtype)
            acc = _add_products(acc, positive, b, held, EVEN, PRECISION)
            if PAIR:
                other = _add_products(other, positive, b + second, held, EVEN, PRECISION)
            if PROLOGUE == _CONCAT_ELU:
                negative = negative.to(a.dtype)
                acc = _add_products(acc, negative, b + channels, held, EVEN, PRECISION)
                if PAIR:
                    other = _add_products(other, negative, b + channels + second, held, EVEN, PRECISION)

    _finish(
        acc, other, bias, context, residual, given, out, pre_gate, m, image, n_first, positions, columns,
        PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
    )  # fmt: skip


@triton.jit
def _activate_kernel(x, out, size, channels, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    """ELU of x [P, channels]; with PAIR that of -x beside it."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places, mask=places < size, other=0.0)
    positive, negative = elu_pair(value.to(tl.float32), x.dtype.element_ty == tl.float32)
    if PAIR:
        places_out = places + places // channels * channels
        tl.store(out + places_out, positive, mask=places < size)
        tl.store(out + places_out + channels, negative, mask=places < size)
    else:
        tl.store(out + places, positive, mask=places < size)


def activated(x: Tensor, kind: int) -> Tensor:
    """ELU or concat-ELU of x [..., C], contiguous."""
    out = x.new_empty((*x.shape[:-1], x.shape[-1] * kind))
    if x.numel():
        _activate_kernel[(triton.cdiv(x.numel(), 1024),)](
            x, out, x.numel(), x.shape[-1], PAIR=kind == 2, BLOCK=1024, num_warps=4
        )
    return out


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
    first_row: int = 0,
) -> None:
    """Fills out [B, R, W, N] from x [B, H, W, K] and packed weights; see `_conv_kernel`."""
    if out.numel() == 0:
        return
    batch, rows, width, columns = out.shape
    positions = batch * rows * width
    require_countable("x: expected positions", positions)
    require_countable("weight: expected elements", weight.numel())
    device = hardware(x.device)
    half = 2 if gate or derivative == 2 else 1

    def choose(kind: int, channels: int) -> Tiles:
        return product_tiles(positions, columns * half, channels, x.dtype, precision, device, max(1, kind))

    tiles = choose(kind, x.shape[-1])
    with on_device(x.device):
        repetitions = taps.count * triton.cdiv(columns * half, tiles.block_n)
        if kind and not is_fused(kind, repetitions, x.dtype, precision, device):
            x, kind = activated(x, kind), 0
            tiles = choose(kind, x.shape[-1])
        short = -x.shape[-1] % CHANNEL_MULTIPLE
        if short:
            x = pad(x, (0, short))
            weight = pad(weight.unflatten(2, (max(1, kind), -1)), (0, short)).flatten(2)
        channels = x.shape[-1]
        block_n = max(16, tiles.block_n // half)
        chunks = triton.cdiv(channels, tiles.block_k)
        grid = (triton.cdiv(positions, tiles.block_m) * triton.cdiv(columns, block_n),)
        _conv_kernel[grid](
            x, weight, bias, context, residual, given, out, pre_gate,
            positions, x.shape[1], width, first_row, rows, channels, columns,
            KERNEL=taps.kernel, ABOVE=taps.above, LEFT=taps.left, TAPS=taps.count, REVERSE=reverse, PROLOGUE=kind,
            GATE=gate, DERIVATIVE=derivative, SAMPLE_CONTEXT=sample_context, PRECISION=kernel_precision(x, precision),
            BLOCK_M=tiles.block_m, BLOCK_N=block_n, BLOCK_K=tiles.block_k, CHUNKS=chunks,
            EVEN=channels % tiles.block_k == 0, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def require_countable(what: str, number: int) -> None:
    """Kernels count in 32 bits, up to a block beyond the end."""
    if number > 2**31 - 1024:
        raise ArgumentError(f"{what} to number at most 2^31 - 1024, got {number}")


def kernel_precision(x: Tensor, precision: str) -> str:
    return "interpreted" if x.device.type == "cpu" and x.dtype == torch.bfloat16 else precision


def nhwc(x: Tensor) -> Tensor:
    """[B, H, W, C], contiguous; a copy unless x is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()
