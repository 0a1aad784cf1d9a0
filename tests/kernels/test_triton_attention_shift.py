"""Attention with a strict mask by the library's causal one, whose rows Triton moves."""

from __future__ import annotations

from functools import partial

import torch
from helpers import refuses
from torch import Tensor
from triton_helpers import Check, checked_in_both, compile_kernel, needs_compiler, needs_triton, serve

from fastvq.errors import UnavailableError
from fastvq.ops import causal_attention_reference
from fastvq.ops.causal_attention.shift import shifted_attention

Shape = tuple[int, int, int, int]


def made(shape: Shape, memory: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key and value [B, heads, N, D], and an upstream gradient; ``memory`` names the order of dimensions."""
    order = ["bhnd".index(letter) for letter in memory]
    found = []
    for seed in range(4):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        found.append(values.permute(order).contiguous().permute([order.index(i) for i in range(4)]))
    return found


def agrees(shape: Shape, memory: str, dtype: torch.dtype, device: str) -> None:
    """Output and gradients; memory that nobody wrote is NaN."""
    *tensors, upstream = made(shape, memory, dtype, device)
    results = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for attend, kind in ((shifted_attention, dtype), (causal_attention_reference, torch.float64)):
            inputs = [tensor.to(kind).detach().requires_grad_() for tensor in tensors]
            out = attend(*inputs)
            results.append([out, *torch.autograd.grad(out, inputs, upstream.to(kind))])
    finally:
        torch.use_deterministic_algorithms(False)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, want in zip(*results, strict=True):
        assert mine.shape == want.shape
        assert mine.dtype == dtype
        assert mine.transpose(1, 2).is_contiguous()
        assert (mine.double() - want).abs().max() <= bound * want.abs().max().clamp(min=1)
    assert (results[0][0][:, :, 0] == 0).all()


def refuses_by_name(device: str) -> None:
    *tensors, upstream = made((2, 2, 5, 8), "bnhd", torch.float32, device)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(shifted_attention(*inputs), inputs, upstream, create_graph=True)
    want = torch.autograd.grad(shifted_attention(*inputs), inputs, upstream)
    for mine, right in zip(found, want, strict=True):
        assert torch.equal(mine, right)
    with refuses(UnavailableError, "causal_attention: the gradient cannot be differentiated again"):
        torch.autograd.grad(found[0].square().sum(), inputs)


def no_samples(device: str) -> None:
    *tensors, upstream = made((0, 2, 5, 8), "bnhd", torch.float32, device)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    out = shifted_attention(*inputs)
    assert out.shape == upstream.shape
    for grad in torch.autograd.grad(out, inputs, upstream):
        assert grad.shape == upstream.shape


GROUPS: dict[str, dict[str, Check]] = {
    "shift": {
        "channels-last": partial(agrees, (2, 3, 21, 16), "bnhd", torch.float32),
        "heads-first": partial(agrees, (2, 3, 21, 16), "bhnd", torch.float32),
        "columns-first": partial(agrees, (2, 3, 9, 8), "bhdn", torch.float32),
        "bfloat16": partial(agrees, (1, 2, 130, 24), "bnhd", torch.bfloat16),
        "two-positions": partial(agrees, (3, 1, 2, 5), "bnhd", torch.float32),
        "no-samples": no_samples,
        "once": refuses_by_name,
    },
}


test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


@needs_triton
@needs_compiler
def test_rows_are_moved_16_bytes_at_a_time() -> None:
    from fastvq.kernels.attention_shift import _pad_kernel

    types = {name: "bf16" for name in _pad_kernel.arg_names if name.endswith("_ptr")}
    divisible = (*_pad_kernel.arg_names[6:15], "length", "columns", "rows")
    constants = {"WIDTH": 64, "BLOCK_M": 8, "BLOCK_N": 512, "down_x": 1}
    for capability in (80, 90, 100):
        found = compile_kernel(_pad_kernel, capability, types, constants, warps=8, divisible=divisible)
        assert found.stack == 0
        assert "st.global.v4" in found.ptx
        assert "ld.global.v4" in found.ptx


if __name__ == "__main__":
    serve(GROUPS)
