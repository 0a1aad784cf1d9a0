"""What is causal on a grid in raster order.

Position (r, c) may depend on rows above r and, on its own row, on columns left of c (*strict*) or up to and including c
(*inclusive*).
"""

from __future__ import annotations

from typing import Literal

Mask = Literal["strict", "inclusive"]
Form = Literal["rows", "symmetric"]
Prologue = Literal["elu", "concat_elu"]
MASKS: tuple[Mask, ...] = ("strict", "inclusive")
FORMS: tuple[Form, ...] = ("rows", "symmetric")
PROLOGUES: tuple[Prologue, ...] = ("elu", "concat_elu")
