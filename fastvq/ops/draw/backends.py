"""The backends of drawing; what a row runs takes logits, uniforms and `DrawOptions`."""

from __future__ import annotations

from fastvq.ops.dispatch import Backend, Backends, anywhere
from fastvq.ops.draw.cpp import draw_cpp, why_not
from fastvq.ops.draw.reference import draw_torch

BACKENDS = Backends("draw", [Backend("cpp", why_not, draw_cpp), Backend("torch", anywhere, draw_torch)])
