"""Keeping reduced precision, which the caller may have switched on, out of results that promise float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in matrix products and convolutions."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, convolution.allow_tf32
        matmul.allow_tf32 = convolution.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32, convolution.allow_tf32 = before


def product_precision(of: str) -> str:
    """Of float32 products on a GPU, ``tf32`` or ``ieee``: as PyTorch's own are set.

    Args:
        of: ``convolution`` or ``attention``.
    """
    backend = torch.backends.cudnn.conv if of == "convolution" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if backend.fp32_precision == "tf32" else "ieee"
