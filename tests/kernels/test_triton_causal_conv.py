"""The Triton kernels of the masked convolution: against loops in float64, and compiled for three chips."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from causal_conv_cases import (
    ACTIVATIONS,
    DTYPES,
    FORMS,
    MASKS,
    Case,
    activate,
    by_loop,
    by_torch,
    close,
    normal,
    read_taps,
    surround,
)
from helpers import refuses
from torch import Tensor
from triton_helpers import (
    Check,
    checked_in_both,
    serve,
)

from fastvq.errors import ArgumentError

NAN = math.nan


def agrees(device: str, case: Case, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Output and all gradients of a case; ``change`` rearranges memory alone."""
    from fastvq.kernels import causal_conv as kernels

    made = case.tensors()
    wide = {name: value.double().requires_grad_() for name, value in made.items()}
    same = {name: value.clone().requires_grad_() for name, value in made.items()}
    made_by = ((by_loop, wide), (by_torch, same))
    products = [
        convolve(activate(part["x"], case.activation), part["weight"], case.mask, case.form)
        for convolve, part in made_by
    ]
    cut = [product.detach().requires_grad_() for product in products]
    want, peer = (surround(case, part, out) for part, out in zip((wide, same), cut, strict=True))
    mine = {name: change(value.to(device)) for name, value in made.items()}
    given = {name: mine.get(name) for name in ("context", "residual")}
    out, pre_gate = kernels.forward(
        mine["x"], mine["weight"], mine["bias"], **case.how, gate=case.gate, keep_pre_gate=case.gate, **given
    )
    close("out", out, want.detach(), peer)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (pre_gate is not None) == case.gate

    grad = normal(*want.shape, seed=5, dtype=case.dtype)
    of_product = torch.autograd.grad(want, cut[0], grad.double())[0].to(case.dtype)
    if pre_gate is not None:
        plain = case._replace(gate=False, residual=False)
        before = [surround(plain, part, out) for part, out in zip((wide, same), products, strict=True)]
        close("pre_gate", pre_gate, before[0].detach(), before[1])
        near = before[1].detach().requires_grad_()
        exact = before[1].detach().double().requires_grad_()
        of_near, of_exact = (
            torch.autograd.grad(F.glu(leaf, dim=1), leaf, grad.to(leaf.dtype))[0] for leaf in (near, exact)
        )
        of_gate, sums = kernels.gate_backward(grad.to(device), near.detach().to(device))
        close("of gate", of_gate, of_exact, of_near)
        close("sums", sums.to(case.dtype), of_exact.sum((0, 2, 3)), of_near.sum((0, 2, 3)))
    mine_grad = change(of_product.to(device))
    of_x = kernels.backward_input(mine_grad, mine["x"], mine["weight"], **case.how)
    of_weight, of_bias = kernels.backward_weight(mine_grad, mine["x"], kernel_size=case.kernel, **case.how)
    leaves = [[part["x"], part["weight"]] for part in (wide, same)]
    wanted, theirs = (
        torch.autograd.grad(product, leaf, of_product.to(product.dtype), materialize_grads=True)
        if product.requires_grad
        else [torch.zeros_like(value) for value in leaf]
        for product, leaf in zip(products, leaves, strict=True)
    )
    close("of x", of_x, wanted[0], theirs[0])
    close("of weight", of_weight, wanted[1], theirs[1])
    close("of bias", of_bias, of_product.double().sum((0, 2, 3)), of_product.sum((0, 2, 3)))
    behind = ~read_taps(case.kernel, case.mask, case.form)
    assert (of_weight.cpu()[:, :, behind] == 0).all()


GRIDS = [(5, 6), (1, 29), (19, 1)]

TAPS: dict[str, Check] = {
    f"{kernel}-{mask}-{form}": partial(agrees, case=Case(kernel, mask, form, shape=(2, 19, *GRIDS[kernel % 3]), out=21))
    for kernel, mask, form in [*itertools.product(range(1, 6), MASKS, FORMS), (7, "inclusive", "symmetric")]
}

# One tap or four: activated while x is read; more: before the product.
TYPES: dict[str, Check] = {
    f"{name}-{activation}-{kernel}": partial(
        agrees, case=Case(kernel, "inclusive", "symmetric", activation, (2, 40, 5, 6), 20, dtype)
    )
    for name, dtype in DTYPES.items()
    for activation, kernel in [(None, 3), *itertools.product(("elu", "concat_elu"), (1, 2, 3))]
}

EPILOGUES: dict[str, Check] = {
    f"{name}-{context}-{'gate' if gate else 'plain'}-{'residual' if residual else 'alone'}-{activation}": partial(
        agrees,
        case=Case(
            1 if activation else 2,
            "inclusive",
            "symmetric",
            activation,
            (2, 7, 3, 5),
            38,
            dtype,
            context,
            gate,
            residual,
        ),
    )
    for (name, dtype), (context, gate, residual, activation) in itertools.product(
        DTYPES.items(),
        [
            (None, True, False, None),
            ("grid", True, True, "concat_elu"),
            ("sample", True, True, "elu"),
            ("sample", False, True, None),
            ("grid", False, False, None),
        ],
    )
}


def wide_and_ragged(device: str) -> None:
    """Several blocks of rows, columns and depth, none of them full."""
    agrees(device, Case(2, shape=(3, 147, 9, 7), out=85, dtype=torch.bfloat16))


def gated_blocks(device: str) -> None:
    agrees(device, Case(1, "inclusive", shape=(2, 20, 9, 8), out=150, gate=True, residual=True, dtype=torch.float16))


def split_positions(device: str) -> str:
    """The weights' gradient adds up several partial sums."""
    from fastvq.kernels import causal_conv_product, causal_conv_weight

    case = Case(1, "inclusive", shape=(2, 3, 21, 19), out=4)
    processors = causal_conv_product.hardware(torch.device(device)).processors
    splits = causal_conv_weight.split_positions(2 * 21 * 19, 1, 16, processors)[1]
    assert splits > 1
    agrees(device, case)
    return f"{splits} splits"


def strided_memory(device: str) -> None:
    def strided(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), NAN).transpose(0, -1).contiguous().transpose(0, -1)
        wide[..., ::2] = x
        assert not wide[..., ::2].is_contiguous()
        return wide[..., ::2]

    agrees(device, Case(3, "inclusive", activation="elu", context="grid", residual=True), strided)
    agrees(device, Case(3, dtype=torch.bfloat16), lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))


def channels_last_memory(device: str) -> None:
    def rearranged(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    agrees(
        device, Case(3, "inclusive", "symmetric", "concat_elu", context="grid", gate=True, residual=True), rearranged
    )


def small_batches(device: str) -> None:
    for batch, activation in itertools.product((0, 1), ACTIVATIONS):
        agrees(device, Case(2, activation=activation, shape=(batch, 3, 2, 3), gate=True, residual=True))


def empty_grids(device: str) -> None:
    case = Case(3, shape=(2, 3, 0, 4))
    got = run_all(device, case, case.tensors(), torch.zeros(2, 6, 0, 4))
    assert got["out"].shape == (2, 6, 0, 4)
    assert got["of_x"].shape == (2, 3, 0, 4)
    assert torch.equal(got["of_weight"].cpu(), torch.zeros(6, 3, 3, 3))
    assert torch.equal(got["of_bias"].cpu(), torch.zeros(6))


def run_all(device: str, case: Case, made: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    from fastvq.kernels import causal_conv as kernels

    made = {name: value.to(device) for name, value in made.items()}
    out, _ = kernels.forward(made["x"], made["weight"], made["bias"], **case.how)
    of_x = kernels.backward_input(grad.to(device), made["x"], made["weight"], **case.how)
    of_weight, of_bias = kernels.backward_weight(grad.to(device), made["x"], kernel_size=case.kernel, **case.how)
    return {"out": out, "of_x": of_x, "of_weight": of_weight, "of_bias": of_bias}


def masked_weights(device: str) -> None:
    """NaN behind the mask reaches nothing."""
    for mask, form, activation in zip(MASKS, FORMS, (None, "elu"), strict=True):
        case = Case(3, mask, form, activation)
        made, grad = case.tensors(), normal(2, 6, 4, 3, seed=5)
        clean = run_all(device, case, made, grad)
        made["weight"][:, :, ~read_taps(3, mask, form)] = NAN
        for name, value in run_all(device, case, made, grad).items():
            assert torch.equal(value, clean[name]), name


def later_positions(device: str) -> None:
    """NaN from a position on reaches no output before it; NaN in a result's gradient only what it was made of."""
    from fastvq.kernels import causal_conv as kernels

    for mask, form, activation in zip(MASKS, FORMS, (None, "concat_elu"), strict=True):
        case = Case(3, mask, form, activation)
        made = case.tensors()
        clean = kernels.forward(made["x"].to(device), made["weight"].to(device), **case.how)[0].flatten(2)
        for position in (0, 1, 5, 11):
            poisoned = made["x"].clone()
            poisoned.flatten(2)[:, :, position:] = NAN
            out = kernels.forward(poisoned.to(device), made["weight"].to(device), **case.how)[0].flatten(2)
            free = position + (mask == "strict")
            assert torch.equal(out[:, :, :free], clean[:, :, :free])
            assert out[:, :, free:].isnan().any() == (free < 12)
            grad = normal(2, 6, 4, 3, seed=5)
            grad.flatten(2)[:, :, : position + 1] = NAN
            of_x = kernels.backward_input(
                grad.to(device), made["x"].to(device), made["weight"].to(device), **case.how
            ).flatten(2)
            first_clean = position + (mask == "inclusive")
            assert of_x[:, :, first_clean:].isfinite().all()


def last_position_of_strict_masks(device: str) -> None:
    """No output reads it, so its NaN must not reach the weights' gradient either."""
    from fastvq.kernels import causal_conv as kernels

    x, grad = normal(1, 3, 4, 5), normal(1, 4, 4, 5, seed=1)
    clean = kernels.backward_weight(grad.to(device), x.to(device), kernel_size=3, mask="strict", form="rows")[0]
    x[:, :, -1, -1] = NAN
    # Nor can the first output's gradient: all it reads is padding.
    grad[:, :, 0, 0] = NAN
    got, of_bias = kernels.backward_weight(grad.to(device), x.to(device), kernel_size=3, mask="strict", form="rows")
    assert torch.equal(got, clean)
    assert of_bias.isnan().all()


def neighbours(device: str) -> None:
    """Images do not reach each other, nor does memory around them."""
    case = Case(3, "inclusive", "symmetric", "elu", (4, 16, 3, 3), 16, torch.bfloat16)
    made, grad = case.tensors(), normal(4, 16, 3, 3, seed=5, dtype=torch.bfloat16)
    clean = run_all(device, case, {**made, "x": made["x"][1:3]}, grad[1:3])
    x, grad = (value.contiguous(memory_format=torch.channels_last) for value in (made["x"], grad))
    x[::3] = grad[::3] = NAN
    inner = run_all(device, case, {**made, "x": x[1:3]}, grad[1:3])
    whole = run_all(device, case, {**made, "x": x}, grad)
    for name, value in clean.items():
        assert torch.equal(inner[name], value), name
    for name in ("out", "of_x"):
        assert torch.equal(whole[name][1:3], clean[name]), name


def poisoned_buffers(device: str) -> None:
    """Every element of every output is written, whatever was in memory before."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.zeros(1, device=device).new_empty(64).isnan().all()
        for dtype in (torch.float32, torch.bfloat16):
            agrees(device, Case(3, "inclusive", "rows", "concat_elu", gate=True, context="sample", dtype=dtype))
            agrees(device, Case(1, "strict", "rows", shape=(1, 3, 2, 3), gate=True, dtype=dtype))
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits_again(device: str) -> None:
    case = Case(2, "inclusive", "rows", "elu", (2, 19, 13, 17), 21)
    made, grad = case.tensors(), normal(2, 21, 13, 17, seed=5)
    first = run_all(device, case, made, grad)
    for name, value in run_all(device, case, made, grad).items():
        assert torch.equal(value, first[name]), name


def rounded_products(device: str) -> str:
    """TF32 rounds operands to 11 bits (the interpreter does not); the bound allows for truncation."""
    from fastvq.kernels import causal_conv as kernels

    case = Case(3, shape=(2, 40, 5, 6), out=20, precision="tf32")
    made = case.tensors()
    out, _ = kernels.forward(made["x"].to(device), made["weight"].to(device), **case.how)
    x, weight = made["x"].double(), made["weight"].double()
    bound = 2.0**-9 * by_loop(x.abs(), weight.abs(), case.mask, case.form)
    errors = (out.cpu().double() - by_loop(x, weight, case.mask, case.form)).abs()
    assert (errors <= bound).all()
    return f"largest error {(errors / bound.clamp(min=1e-30)).max():.2f} of the bound"


def wide_gradient(device: str) -> None:
    """Gradients of weights can be had in float32, where they were summed."""
    from fastvq.kernels import causal_conv as kernels

    x, grad = normal(2, 5, 4, 3, dtype=torch.bfloat16), normal(2, 6, 4, 3, seed=1, dtype=torch.bfloat16)
    how = {"kernel_size": 2, "mask": "strict", "form": "rows"}
    wide = kernels.backward_weight(grad.to(device), x.to(device), **how, dtype=torch.float32)
    narrow = kernels.backward_weight(grad.to(device), x.to(device), **how)
    for a, b in zip(wide, narrow, strict=True):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b.float())
        assert torch.equal(a.bfloat16(), b)


def refusals(device: str) -> None:
    from fastvq.kernels import causal_conv as kernels

    x, weight = (torch.zeros(*shape, device=device) for shape in ((2, 5, 4, 3), (6, 5, 3, 3)))
    how: dict[str, Any] = {"mask": "strict", "form": "rows"}
    with refuses(ArgumentError, "weight: expected 10 input channels, got 5"):
        kernels.forward(x, weight, **how, activation="concat_elu")
    with refuses(ArgumentError, "weight: expected an even number of output channels to gate, got 5"):
        kernels.forward(x, weight[:5], **how, gate=True)
    with refuses(ArgumentError, "x: expected the input"):
        kernels.backward_input(torch.zeros(2, 6, 4, 3, device=device), None, weight, **how, activation="elu")
    many = torch.empty(1, 5, 2**16, 2**15, device="meta")
    with refuses(ArgumentError, "x: expected positions to number at most 2.31 - 1024, got 2147483648"):
        kernels.forward(many, weight.to("meta"), **how)
    with refuses(ArgumentError, "x: expected positions to number at most 2.31 - 1024, got 2147483648"):
        kernels.backward_weight(many, many, kernel_size=2, **how)


MEMORY: dict[str, Check] = {
    check.__name__: check
    for check in (
        wide_and_ragged,
        gated_blocks,
        split_positions,
        strided_memory,
        channels_last_memory,
        small_batches,
        empty_grids,
        masked_weights,
        later_positions,
        last_position_of_strict_masks,
        neighbours,
        poisoned_buffers,
        same_bits_again,
        rounded_products,
        wide_gradient,
        refusals,
    )
}

GROUPS = {"taps": TAPS, "types": TYPES, "epilogues": EPILOGUES, "memory": MEMORY}


test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


if __name__ == "__main__":
    serve(GROUPS)
