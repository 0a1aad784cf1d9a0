"""What is causal on a grid in raster order, and which taps of a kernel are.

Position (r, c) may depend on rows above r and, on its own row, on columns left of c (*strict*) or up to and including c
(*inclusive*).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Mask = Literal["strict", "inclusive"]
Form = Literal["rows", "symmetric"]
Prologue = Literal["elu", "concat_elu"]
MASKS: tuple[Mask, ...] = ("strict", "inclusive")
FORMS: tuple[Form, ...] = ("rows", "symmetric")
PROLOGUES: tuple[Prologue, ...] = ("elu", "concat_elu")


class Taps(NamedTuple):
    """The taps of a k x k kernel that are read: ``above`` whole rows, then ``current`` columns of the next.

    Column j of the kernel reads j - ``left`` columns to the right of the current position.
    """

    above: int
    left: int
    current: int


def read_taps(kernel_size: int, mask: str, form: str) -> Taps:
    above = kernel_size - 1 if form == "rows" else kernel_size // 2
    left = kernel_size // 2
    return Taps(above, left, left + (mask == "inclusive"))
