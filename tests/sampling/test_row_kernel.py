"""The row phase with the project's own convolution, against the library's."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cuda_stand_in import BATCH, CPU
from engine_helpers import (
    grids,
    request_of,
    spread,
)
from helpers import refuses, snail
from plan_priors import GIVEN, PRIORS
from triton_helpers import Check, assert_interpreted, names, needs_gpu, needs_triton, serve

from fastvq._precision import full_float32
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.models import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import static_inputs
from fastvq.sampling.engines.cuda import CudaEngine
from fastvq.sampling.engines.state import CompiledPlan, GridState
from fastvq.sampling.plan import compile_plan

pytestmark = pytest.mark.usefixtures("steady")


EXTRA: dict[str, Callable[[], Prior]] = {
    **{name: partial(make, **GIVEN["both"]) for name, make in PRIORS.items()},
    "wide": lambda: snail(shape=(5, 7), channels=20, residual_channels=12, kernel_size=5),
    "one-column": lambda: snail(shape=(4, 1)),
}


def check_row_kernel(make: Callable[[], Prior], device: str) -> str:
    """The same values as the library's for every row of random caches, to float32 rounding."""
    prior = spread(make()).to(device)
    plan = compile_plan(prior)
    codes, given = grids(prior, BATCH)
    request = request_of(prior, BATCH, given, seed=0)
    statics = static_inputs(prior, request)
    states = {}
    for kernel in ("library", "triton"):
        compiled = CompiledPlan(plan, torch.device(device), kernel)
        states[kernel] = GridState(compiled, BATCH, statics)
    compared, largest = 0, 0.0
    generator = torch.Generator().manual_seed(0)
    for row in range(plan.shape[0]):
        for state in states.values():
            state.codes.copy_(codes)
            state.begin_row(row)
        for index, wanted in states["library"].rows.items():
            found = states["triton"].rows[index]
            assert found.shape == wanted.shape
            scale = float(wanted.abs().max()) + 1e-6
            largest = max(largest, float((found - wanted).abs().max()) / scale)
            compared += row > 0 and any(not conv.direct for conv in states["triton"].compiled.convs.get(index, ()))
        # What the step phase would leave behind.
        for index in states["library"].rings:
            if plan.timing[index] != "row":
                values = torch.randn(BATCH, plan.shape[1], plan.ops[index].channels, generator=generator)
                for state in states.values():
                    other = state.rings[index]
                    other.data[:, other.slot, other.left : other.left + plan.shape[1]] = values.to(device)
    assert largest < 2e-5, largest
    has_rows = any(not conv.direct for convs in states["triton"].compiled.convs.values() for conv in convs)
    assert (compared > 0) == (has_rows and plan.shape[0] > 1)
    return f"{compared} operations, relative difference {largest:.1e}"


def _row_check(name: str) -> Check:
    def check(device: str) -> str:
        # As samplers do: a library's convolution of float32 may be one of TF32 otherwise.
        with torch.inference_mode(), full_float32(torch.device(device)):
            return check_row_kernel(EXTRA[name], device)

    return check


GROUPS: dict[str, dict[str, Check]] = {
    "row-kernel": {name: _row_check(name) for name in EXTRA},
}


@needs_triton
@pytest.mark.parametrize(("group", "name"), names(GROUPS))
def test_row_kernel_in_the_interpreter(group: str, name: str) -> None:
    assert_interpreted(__file__, group, name)


@needs_gpu
@pytest.mark.parametrize("name", EXTRA)
def test_row_kernel_on_a_gpu(name: str) -> None:
    GROUPS["row-kernel"][name]("cuda")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")
def test_row_kernel_without_a_gpu() -> None:
    prior = snail()
    with refuses(UnavailableError, "row_kernel: 'triton' was asked for but cannot run here: it needs a GPU"):
        CompiledPlan(compile_plan(prior), CPU, "triton")
    with refuses(UnavailableError, "row_kernel: 'triton' was asked for but cannot run here: it needs a GPU"):
        CudaEngine().check(EngineOptions(row_kernel="triton"), CPU)
    with refuses(ArgumentError, "row_kernel: expected one of 'library', 'triton', got 'cudnn'"):
        CompiledPlan(compile_plan(prior), CPU, "cudnn")  # type: ignore[arg-type]


if __name__ == "__main__":
    serve(GROUPS)
