"""Exponentials, ELU and sigmoid with the accuracy of float32, which ``tl.exp`` does not have on a GPU.

There it is a product with log2(e), whose rounding alone makes an error of x / 2 units at x, and an approximate
power of 2; ``exp(x) - 1`` loses all digits near 0 besides. Here x is reduced by multiples of ln 2, and a polynomial
does the rest: at most two units off, all the way down to where results become subnormal. Without PRECISE these are the
shorter forms, for results that are rounded to 11 bits or fewer.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["elu_pair", "exp_negative", "expm1_negative", "sigmoid", "sigmoids"]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# ln 2 in two parts. Multiples of the first are exact: it has nine bits.
_LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)
_LN2_LOW: tl.constexpr = tl.constexpr(-2.12194440054690583e-4)
# exp is 0 from here on.
_LOWEST: tl.constexpr = tl.constexpr(-104.0)


@triton.jit
def _reduced(x):
    """exp(r) - 1 and two factors whose product is 2^n, where x = n ln 2 + r and |r| <= ln(2) / 2, of a block <= 0."""
    x = tl.maximum(x, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * _LOG2_E + 0.5)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    series = 1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * (1 / 40320)))
    series = r + r * r * (0.5 + r * (1 / 6 + r * (1 / 24 + r * series)))
    # 2^n itself may be subnormal. NaN is left to the series: no integer stands for it.
    whole = tl.where(x == x, n, 0.0).to(tl.int32)
    half = whole >> 1
    return series, _power_of_2(half), _power_of_2(whole - half)


@triton.jit
def _power_of_2(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_negative(x, PRECISE: tl.constexpr):
    """exp of a block <= 0."""
    if PRECISE:
        series, first, second = _reduced(x)
        return (1 + series) * first * second
    return tl.exp(x)


@triton.jit
def expm1_negative(x, PRECISE: tl.constexpr):
    """exp(x) - 1 of a block <= 0."""
    if PRECISE:
        series, first, second = _reduced(x)
        power = first * second
        return power * series + (power - 1)
    return tl.exp(x) - 1


@triton.jit
def elu_pair(x, PRECISE: tl.constexpr):
    """elu(x) and elu(-x) of a block, which share their exponential."""
    below = expm1_negative(-tl.abs(x), PRECISE)
    return tl.where(x > 0, x, below), tl.where(x < 0, -x, below)


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr):
    """Of a block."""
    if PRECISE:
        return sigmoids(x)[0]
    return tl.sigmoid(x)


@triton.jit
def sigmoids(x):
    """The sigmoids of x and -x of a block, neither as a difference from 1, with the accuracy of float32."""
    below = exp_negative(-tl.abs(x), True)
    larger = tl.div_rn(1.0, 1 + below)
    smaller = tl.div_rn(below, 1 + below)
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)
