"""Exponentials, ELU and sigmoid of the Triton kernels against float64, in units of the last place of float32."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_helpers import Check, checked_in_both, compile_kernel, needs_compiler, needs_triton, serve

# Half a unit for the last rounding and some of one before it; a sigmoid is rounded four times: by the exponential, the
# sum and the quotient, and a sum just above 1 has units of half the size.
ALLOWED = {"exp": 1.0, "expm1": 1.0, "sigmoid": 2.25, "sigmoid-of-minus": 2.25, "elu": 1.0, "elu-of-minus": 1.0}


def evaluated(x: Tensor, device: str) -> dict[str, Tensor]:
    from elementary_kernel import FUNCTIONS, every_function

    out = torch.empty(len(FUNCTIONS), x.numel(), device=device)
    every_function[(-(-x.numel() // 1024),)](x.to(device), out, x.numel(), BLOCK=1024)
    return dict(zip(FUNCTIONS, out.cpu(), strict=True))


def exact(x: Tensor) -> dict[str, Tensor]:
    """In float64."""
    x = x.double()
    below = -x.abs()
    return {
        "exp": below.exp(), "expm1": below.expm1(), "sigmoid": x.sigmoid(), "sigmoid-of-minus": (-x).sigmoid(),
        "elu": F.elu(x), "elu-of-minus": F.elu(-x),
    }  # fmt: skip


def numbers() -> Tensor:
    """Of all sizes, down to subnormal ones, and dense where a series meets another."""
    generator = torch.Generator().manual_seed(0)
    tiny = 10 ** (torch.rand(4096, generator=generator) * -44) * torch.randn(4096, generator=generator).sign()
    parts = [torch.randn(8192, generator=generator) * scale for scale in (1.0, 10.0, 30.0)]
    return torch.cat([*parts, tiny, torch.linspace(-1.5, 1.5, 8192), torch.arange(-105.0, 106.0)])


def check_units(name: str, device: str) -> str:
    x = numbers()
    got, want = evaluated(x, device)[name].double(), exact(x)[name]
    unit = torch.from_numpy(np.spacing(want.abs().float().numpy())).double()
    worst = float(((got - want).abs() / unit).max())
    assert worst <= ALLOWED[name], f"{name}: {worst:.2f} units"
    return f"{worst:.2f} units"


def check_special_values(device: str) -> None:
    inf = math.inf
    found = evaluated(torch.tensor([inf, -inf, 0.0, math.nan]), device)
    wanted = {
        "exp": [0.0, 0.0, 1.0], "expm1": [-1.0, -1.0, 0.0], "sigmoid": [1.0, 0.0, 0.5],
        "sigmoid-of-minus": [0.0, 1.0, 0.5], "elu": [inf, -1.0, 0.0], "elu-of-minus": [-1.0, inf, 0.0],
    }  # fmt: skip
    for name, values in wanted.items():
        assert found[name][:3].tolist() == values, name
        assert found[name][3].isnan(), name


GROUPS: dict[str, dict[str, Check]] = {
    "elementary": {**{name: partial(check_units, name) for name in ALLOWED}, "special-values": check_special_values}
}

test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_nothing_approximate_is_compiled(capability: int) -> None:
    from elementary_kernel import every_function

    types = {"x_ptr": "fp32", "out_ptr": "fp32"}
    found = compile_kernel(every_function, capability, types, {"BLOCK": 1024}, warps=4)
    assert "ex2.approx" not in found.ptx
    assert "div.full" not in found.ptx
    assert "div.rn.f32" in found.ptx


if __name__ == "__main__":
    serve(GROUPS)
