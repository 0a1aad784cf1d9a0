"""Which precision products of float32 have on a GPU: one rule for all of fastvq.

PyTorch's own switches decide, of the library's operators and of the project's Triton kernels alike:
``torch.backends.cudnn.conv.fp32_precision`` of convolutions (``tf32`` unless changed), and
``torch.backends.cuda.matmul.fp32_precision`` of matrix products and attention (full float32 unless changed). The older
``torch.backends.cudnn.allow_tf32``, ``torch.backends.cuda.matmul.allow_tf32`` and
``torch.set_float32_matmul_precision`` write these too, but raise when read after only some of them were written by
their new names; so the new names alone are read and written here. What promises float32 whatever the switches say, as
samplers do, runs inside `full_float32`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

Product = Literal["convolution", "attention"]


def product_precision(of: Product) -> str:
    """Of float32 products on a GPU, ``tf32`` or ``ieee``, as PyTorch's own are set; nothing is changed."""
    return "tf32" if _switch(of).fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in matrix products and convolutions."""
    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as changes:
        if device.type == "cuda":
            changes.enter_context(_set(_switch("convolution"), "ieee"))
            changes.enter_context(_set(_switch("attention"), "ieee"))
        yield


def _switch(of: Product) -> Any:
    """Where PyTorch keeps ``fp32_precision``."""
    return torch.backends.cudnn.conv if of == "convolution" else torch.backends.cuda.matmul  # type: ignore[attr-defined]


@contextlib.contextmanager
def _set(switch: Any, precision: str) -> Iterator[None]:
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        # Written as ``none``, a switch follows the ones above it, as it may have done before.
        switch.fp32_precision = "none"
        if switch.fp32_precision != before:
            switch.fp32_precision = before
