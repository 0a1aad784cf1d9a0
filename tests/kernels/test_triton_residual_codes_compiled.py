"""The Triton kernels of residual codes, compiled for three chips as they would be launched."""

from __future__ import annotations

from typing import Any

import pytest
from triton_helpers import Resources, assert_fits, compile_kernel, needs_compiler, needs_triton

TYPES = {
    "codebooks_ptr": "fp32",
    "ready_ptr": "fp32",
    "codes16_ptr": "fp16",
    "depths_ptr": "i64",
    "found_ptr": "i32",
    "indices_ptr": "i64",
    "quantized_ptr": "fp32",
    "sums_ptr": "fp32",
    "counts_ptr": "i64",
    "errors_ptr": "fp32",
    "keys_ptr": "i32",
    "order_ptr": "i64",
    "ends_ptr": "i64",
}
STRIDES = {"x_stride_n", "codebooks_stride_q", "codebooks_stride_k", "width"}


def compiled(kernel: Any, capability: int, dtype: str, warps: int, stages: int = 3, **constants: Any) -> Resources:
    types = {name: {"x_ptr": dtype, **TYPES}[name] for name in kernel.arg_names if name in ("x_ptr", *TYPES)}
    return compile_kernel(
        kernel, capability, types, constants, warps=warps, stages=stages, divisible=tuple(STRIDES)
    )  # fmt: skip


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("width", "dtype", "exact", "partly"),
    [(32, "fp32", True, False), (128, "fp32", True, True), (128, "bf16", False, False), (256, "fp32", True, False)],
    ids=lambda value: str(value),
)
def test_compiled_levels_fit_the_chip(capability: int, width: int, dtype: str, exact: bool, partly: bool) -> None:
    from fastvq.kernels import residual_codes as kernels

    tiles = kernels.level_tiles(width, 1024, capability)
    resources = compiled(
        kernels._levels_kernel,
        capability,
        dtype,
        tiles.warps,
        tiles.stages,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        BLOCK_D=width,
        PROGRAMS=32,
        EXACT=exact,
        PARTLY=partly,
    )
    assert_fits(resources, capability)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_statistics_fit_the_chip(capability: int) -> None:
    from fastvq.kernels import residual_codes as kernels

    blocks = {"BLOCK_N": kernels._SUM_ROWS, "BLOCK_D": kernels._SUM_COLUMNS}
    for statistics, atomic in ((True, True), (True, False), (False, True)):
        flags = {"STATISTICS": statistics, "ATOMIC": atomic}
        assert_fits(compiled(kernels._follow_kernel, capability, "fp32", 4, **flags, **blocks), capability)
    assert_fits(compiled(kernels._ordered_sums_kernel, capability, "bf16", 4, **blocks), capability)
