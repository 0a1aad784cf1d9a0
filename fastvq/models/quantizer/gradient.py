"""What a code passes back to the vector it stands for. Both leave the code itself exactly as it is."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.ops.dispatch import is_batched, is_differentiated

CodeGradient = Literal["straight_through", "rotation"]
CODE_GRADIENTS: tuple[CodeGradient, ...] = ("straight_through", "rotation")


def pass_gradient(x: Tensor, code: Tensor, kind: CodeGradient) -> Tensor:
    """``code`` [..., D], bit for bit, whose gradient goes to ``x`` [..., D] and not to the codes.

    With ``straight_through`` it goes there unchanged (van den Oord et al. 2017, section 3.2). With ``rotation`` it goes
    as through the rotation and scaling that take x onto the code q, both held constant (Fifty et al. 2024,
    arXiv 2410.06424, section 4.2)::

        q = s R x,  s = |q| / |x|,  R = I - 2 r r' + 2 b a',  a = x / |x|,  b = q / |q|,  r = (a + b) / |a + b|,

    so that g becomes s R' g = s (g - 2 r (r.g) + 2 a (b.g)). That is the identity where x = q; its length is ``s |g|``,
    and its angle to x that of g to q. Where x or q is 0 there is no rotation and g passes unchanged; where they are
    opposite, R is the reflection I - 2 a a'. Computed in float32 at least, without D x D matrices.
    """
    if is_batched() or is_differentiated():
        return (_TransformedRotation if kind == "rotation" else _TransformedStraightThrough).apply(x, code)
    return (_Rotation if kind == "rotation" else _StraightThrough).apply(x, code)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, code: Tensor) -> Tensor:
        # A view made here could not be changed in place by what comes next.
        return code.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, code: Tensor) -> Tensor:
        return code.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, code = (value.detach() for value in ctx.saved_tensors)
        return rotate_back(grads[0], x, code), None


class _TransformedStraightThrough(_StraightThrough):
    """With what torch.func and forward mode ask for, and compilers do not take."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_code: Tensor | None) -> Tensor:
        (output,) = ctx.saved_tensors
        return torch.zeros_like(output) if of_x is None else of_x.to(output.dtype, copy=True)


class _TransformedRotation(_Rotation):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_code: Tensor | None) -> Tensor:
        x, code = (value.detach() for value in ctx.saved_tensors)
        return torch.zeros_like(code) if of_x is None else rotate(of_x, x, code)


def rotate(tangent: Tensor, x: Tensor, code: Tensor) -> Tensor:
    """s R t as in `pass_gradient`, in the type of ``code``."""
    return _turn(tangent, x, code, back=False).to(code.dtype)


def rotate_back(grad: Tensor, x: Tensor, code: Tensor) -> Tensor:
    """s R' g as in `pass_gradient`, in the type of ``x``."""
    return _turn(grad, x, code, back=True).to(x.dtype)


def _turn(value: Tensor, x: Tensor, code: Tensor, *, back: bool) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, code.dtype), torch.float32)
    g, u, q = value.to(wide), x.to(wide), code.to(wide)
    length, code_length = u.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    possible = (length > 0) & (code_length > 0)
    a, b = u / torch.where(possible, length, 1), q / torch.where(possible, code_length, 1)
    r = F.normalize(a + b, dim=-1, eps=1e-6)
    scale = code_length / torch.where(possible, length, 1)
    # R' takes b to a, R takes a to b.
    onto, along = (a, b) if back else (b, a)
    rotated = scale * (g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * onto * (along * g).sum(-1, keepdim=True))
    return torch.where(possible, rotated, g)
