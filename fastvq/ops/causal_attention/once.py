"""Gradients of PyTorch's attention that refuse to be differentiated by the name of our operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.ops.causal_attention import backends


class Once(torch.autograd.Function):
    """Its arguments, whose gradients refuse to be differentiated by the name of the operation that they are given to.

    PyTorch's operator refuses too on most devices, naming a function of its own.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return Refusing.apply(*grads) if torch.is_grad_enabled() else grads


class Refusing(torch.autograd.Function):
    """Its arguments, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        backends.no_second_gradient(ctx, *grads)
