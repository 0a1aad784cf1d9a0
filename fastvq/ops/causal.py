"""Causal operators over a grid of codes in raster order: masked convolution, code look-up, attention."""

from __future__ import annotations

from fastvq.ops.causal_attention import causal_attention
from fastvq.ops.causal_conv import causal_conv2d, fused_causal_conv2d
from fastvq.ops.causal_grid import FORMS, MASKS, PROLOGUES, Form, Mask, Prologue
from fastvq.ops.causal_reference import (
    activate,
    causal_attention_reference,
    causal_conv2d_reference,
    fused_causal_conv2d_reference,
)
from fastvq.ops.code_conv import code_conv2d

__all__ = [
    "FORMS",
    "MASKS",
    "PROLOGUES",
    "Form",
    "Mask",
    "Prologue",
    "activate",
    "causal_attention",
    "causal_attention_reference",
    "causal_conv2d",
    "causal_conv2d_reference",
    "code_conv2d",
    "fused_causal_conv2d",
    "fused_causal_conv2d_reference",
]
