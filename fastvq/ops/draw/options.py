"""How codes are drawn, checked."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from fastvq._check import require_real
from fastvq.errors import ArgumentError, ArgumentTypeError

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class DrawOptions:
    """Checked options; temperature and top_p are float32 values, top_k and top_p are None where they keep all.

    Greedy drawing is the best one alone, at a temperature of 1.
    """

    temperature: float
    top_k: int | None
    top_p: float | None


def check_options(num_codes: int, temperature: object, top_k: object, top_p: object) -> DrawOptions:
    """The options of `draw` over ``num_codes`` codes, checked; errors are those of `draw`."""
    heat = require_real("temperature", temperature)
    if heat != 0 and not _FLOAT32.tiny <= heat <= _FLOAT32.max:
        expected = f"0, or a finite number > 0 (as float32: {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g})"
        raise ArgumentError(f"temperature: expected {expected}, got {temperature!r}")
    keep_k, keep_p = None, None
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise ArgumentTypeError(f"top_k: expected an int or None, got {type(top_k).__name__} {top_k!r}")
        if not 1 <= top_k <= num_codes:
            raise ArgumentError(f"top_k: expected 1..{num_codes}, the number of codes, got {top_k}")
        keep_k = None if top_k == num_codes else top_k
    if top_p is not None:
        share = require_real("top_p", top_p)
        if not 0 < share <= 1:
            raise ArgumentError(f"top_p: expected a number in (0, 1], got {top_p!r}")
        share = max(_round32(share), _FLOAT32.tiny)
        keep_p = share if share < 1 else None
    if heat == 0:
        return DrawOptions(1.0, 1, None)
    return DrawOptions(_round32(heat), keep_k, keep_p)


def _round32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
