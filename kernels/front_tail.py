"""What follows the products of a level in a step of the sampler: sums, gates, additions, activations, looked-up codes.

A level is a list of chains of instructions, read from a table. A chain runs through a block of positions and channels
with the last instruction's vector in registers; chains of one launch are independent of each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.kernels.elementary import elu_pair, expm1_negative
from fastvq.kernels.front_planes import store_planes
from fastvq.kernels.front_product import positions

INSTR_FIELDS, CHAIN_FIELDS = 32, 4
_INSTR_FIELDS: tl.constexpr = tl.constexpr(INSTR_FIELDS)
_CHAIN_FIELDS: tl.constexpr = tl.constexpr(CHAIN_FIELDS)

# What an instruction reads, and what it adds.
SOURCES = {"sum": 0, "values": 1, "lookup": 2}
_SUM: tl.constexpr = tl.constexpr(0)
_VALUES: tl.constexpr = tl.constexpr(1)
OPERANDS = {"none": 0, "last": 1, "values": 2}
_LAST: tl.constexpr = tl.constexpr(1)
_ADDED_VALUES: tl.constexpr = tl.constexpr(2)
GATES = {"": 0, "glu": 1, "tanh": 2}
_TANH: tl.constexpr = tl.constexpr(2)
ACTIVATIONS = {"": 0, "elu": 1, "concat_elu": 2, "relu": 3}
_CONCAT_ELU: tl.constexpr = tl.constexpr(2)
_RELU: tl.constexpr = tl.constexpr(3)
_PARTS_AHEAD: tl.constexpr = tl.constexpr(4)


@triton.jit
def _tanh(x):
    """Of a block, without the cancellation of a difference of exponentials near zero."""
    below = expm1_negative(-2 * tl.abs(x), True)
    size = -below / (2 + below)
    return tl.where(x < 0, -size, size)


@triton.jit
def _sum_parts(partials_ptr, instr, offs_m, offs_c, rows, mask):
    """The sum of an operation's parts in their order, [M, C]."""
    count = tl.load(instr + 2).to(tl.int32)
    columns = tl.load(instr + 4)
    ptrs = partials_ptr + tl.load(instr + 1) + offs_m[:, None] * columns + offs_c[None, :]  # [M, C]
    total = tl.zeros([offs_m.shape[0], offs_c.shape[0]], tl.float32)  # [M, C]
    for first in range(0, count, _PARTS_AHEAD):
        # Loads of an iteration do not wait for each other.
        for index in tl.static_range(_PARTS_AHEAD):
            there = mask & (tl.zeros_like(offs_c) + first + index < count)[None, :]  # [M, C]
            total += tl.load(ptrs + (first + index) * rows * columns, mask=there, other=0.0)
    return total


@triton.jit
def _look_up(
    codes_ptr, params_ptr, taps_ptr, instr, row, col, sample, offs_c, num_codes, mask,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum over taps of the vectors of the codes there, [M, C]."""
    count = tl.load(instr + 2).to(tl.int32)
    taps_ptr += tl.load(instr + 3) * 2
    table_ptr = params_ptr + tl.load(instr + 1)
    channels = tl.load(instr + 4)
    total = tl.zeros([row.shape[0], offs_c.shape[0]], tl.float32)  # [M, C]
    for tap in range(count):
        from_row = row + tl.load(taps_ptr + tap * 2).to(tl.int32)  # [M]
        from_col = col + tl.load(taps_ptr + tap * 2 + 1).to(tl.int32)  # [M]
        inside = (from_row >= 0) & (from_col >= 0) & (from_col < WIDTH)  # [M]
        place = (sample.to(tl.int64) * HEIGHT + from_row) * WIDTH + from_col  # [M]
        inside_grid = inside[:, None] & mask  # [M, C]
        code = tl.load(codes_ptr + place, mask=inside & (row < HEIGHT) & (col >= 0), other=0)  # [M]
        vector_ptrs = table_ptr + (tap * num_codes + code)[:, None] * channels + offs_c[None, :]  # [M, C]
        total += tl.load(vector_ptrs, mask=inside_grid, other=0.0)
    return total


@triton.jit
def _read(
    codes_ptr, partials_ptr, values_ptr, params_ptr, taps_ptr, instr, offs_m, row, col, sample, offs_c,
    rows, num_codes, mask, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Channels ``offs_c`` of what an instruction reads, [M, C]."""
    source = tl.load(instr)
    value = tl.zeros([offs_m.shape[0], offs_c.shape[0]], tl.float32)  # [M, C]
    if source == _VALUES:
        ptrs = values_ptr + tl.load(instr + 1) + offs_m[:, None] * tl.load(instr + 4) + offs_c[None, :]  # [M, C]
        value = tl.load(ptrs, mask=mask, other=0.0)
    else:
        bias = tl.load(params_ptr + tl.load(instr + 5) + offs_c[None, :], mask=mask, other=0.0)  # [M, C]
        if source == _SUM:
            value = _sum_parts(partials_ptr, instr, offs_m, offs_c, rows, mask)
        else:
            value = _look_up(
                codes_ptr, params_ptr, taps_ptr, instr, row, col, sample, offs_c, num_codes, mask, HEIGHT, WIDTH
            )
        value = bias + value
    return value


@triton.jit
def _write(
    features_ptr, kept_ptr, values_ptr, fields, value, second, offs_m, step, row, col, sample, offs_c, channels, plane,
    mask, DOUBLE, PLANES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Stores a block [M, C], and with DOUBLE another one behind it, where the ``fields`` of an instruction say."""
    to_values = tl.load(fields)
    to_features = tl.load(fields + 1)
    if to_values >= 0:
        ptrs = values_ptr + to_values + offs_m[:, None] * tl.where(DOUBLE, channels * 2, channels) + offs_c[None, :]
        tl.store(ptrs, value, mask=mask)
        if DOUBLE:
            tl.store(ptrs + channels, second, mask=mask)
    if to_features >= 0:
        slot = step % tl.load(fields + 2).to(tl.int32)
        ring_row = row % tl.load(fields + 4).to(tl.int32)  # [M]
        offs = to_features + slot * tl.load(fields + 3) + ring_row * tl.load(fields + 5)  # [M]
        offs = (offs + sample * tl.load(fields + 6) + col * tl.load(fields + 7)) * UNIT  # [M]
        offs_feature = offs[:, None] + offs_c[None, :]  # [M, C]
        store_planes(features_ptr + offs_feature, plane, value, mask, PLANES)
        if DOUBLE:
            store_planes(features_ptr + offs_feature + channels, plane, second, mask, PLANES)
        if kept_ptr is not None:
            tl.store(kept_ptr + offs_feature, value, mask=mask)
            if DOUBLE:
                tl.store(kept_ptr + offs_feature + channels, second, mask=mask)


@triton.jit
def _tail_kernel(
    step_ptr, codes_ptr, features_ptr, kept_ptr, partials_ptr, values_ptr, params_ptr, taps_ptr, instrs_ptr, chains_ptr,
    batch, rows, num_codes, plane,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKEW: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Runs chain 1 of the grid for a block of positions and channels.

    Values are float32 [positions, channels], of the current step, and parts [rows, channels]. Features have PLANES, and
    offsets of them count UNIT numbers, see `_product_kernel`; unless ``kept_ptr`` is None they are float32 numbers
    there as well.
    """
    step = tl.load(step_ptr)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row, col, sample, mask_m = positions(step, offs_m, batch, HEIGHT, WIDTH, SKEW)  # [BLOCK_M] each
    offs_m = offs_m.to(tl.int64)
    chain = chains_ptr + tl.program_id(1) * _CHAIN_FIELDS
    offs_c = tl.load(chain + 2).to(tl.int32) + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    last = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)  # [BLOCK_M, BLOCK_C]
    for index in range(tl.load(chain), tl.load(chain + 1)):
        instr = instrs_ptr + index * _INSTR_FIELDS
        gate = tl.load(instr + 6)
        operand = tl.load(instr + 7)
        activation = tl.load(instr + 17)
        channels = tl.load(instr + 27).to(tl.int32)
        mask = mask_m[:, None] & (offs_c < channels)[None, :]  # [BLOCK_M, BLOCK_C]
        value = _read(
            codes_ptr, partials_ptr, values_ptr, params_ptr, taps_ptr, instr, offs_m, row, col, sample, offs_c,
            rows, num_codes, mask, HEIGHT, WIDTH,
        )  # fmt: skip
        if gate != 0:
            by = _read(
                codes_ptr, partials_ptr, values_ptr, params_ptr, taps_ptr, instr, offs_m, row, col, sample,
                offs_c + channels, rows, num_codes, mask, HEIGHT, WIDTH,
            )  # fmt: skip
            if gate == _TANH:
                value = _tanh(value)
            value = value * tl.sigmoid(by)
        if operand == _LAST:
            value = last + value
        elif operand == _ADDED_VALUES:
            ptrs = values_ptr + tl.load(instr + 8) + offs_m[:, None] * channels + offs_c[None, :]  # [M, C]
            value = tl.load(ptrs, mask=mask, other=0.0) + value
        _write(
            features_ptr, kept_ptr, values_ptr, instr + 9, value, value, offs_m, step, row, col, sample, offs_c,
            channels, plane, mask, False, PLANES, UNIT,
        )  # fmt: skip
        last = value
        if activation != 0:
            positive, negative = elu_pair(value, True)  # [BLOCK_M, BLOCK_C] each
            if activation == _RELU:
                positive = tl.where(value < 0, 0.0, value)  # a maximum would hide NaN
            _write(
                features_ptr, kept_ptr, values_ptr, instr + 18, positive, negative, offs_m, step, row, col, sample,
                offs_c, channels, plane, mask, activation == _CONCAT_ELU, PLANES, UNIT,
            )  # fmt: skip
            if tl.load(instr + 26) != 0:
                last = positive
