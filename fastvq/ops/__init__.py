"""Functional operations: each validates its arguments, chooses a backend and applies it."""

from fastvq.ops.causal_attention import causal_attention, causal_attention_reference
from fastvq.ops.causal_conv import (
    causal_conv2d,
    causal_conv2d_reference,
    fused_causal_conv2d,
    fused_causal_conv2d_reference,
)
from fastvq.ops.code_conv import code_conv2d
from fastvq.ops.draw import draw, draw_margin, draw_reference
from fastvq.ops.ema_update import ema_update, ema_update_reference
from fastvq.ops.explain import explain_backend
from fastvq.ops.nearest_code import CodeStatistics, nearest_code, nearest_code_statistics
from fastvq.ops.residual_codes import ResidualCodes, ResidualStatistics, residual_codes, residual_codes_statistics

__all__ = [
    "CodeStatistics",
    "ResidualCodes",
    "ResidualStatistics",
    "causal_attention",
    "causal_attention_reference",
    "causal_conv2d",
    "causal_conv2d_reference",
    "code_conv2d",
    "draw",
    "draw_margin",
    "draw_reference",
    "ema_update",
    "ema_update_reference",
    "explain_backend",
    "fused_causal_conv2d",
    "fused_causal_conv2d_reference",
    "nearest_code",
    "nearest_code_statistics",
    "residual_codes",
    "residual_codes_statistics",
]
