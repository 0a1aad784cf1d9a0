"""The Triton kernels of nearest code, compiled for three chips as they would be launched."""

from __future__ import annotations

from typing import Any

import pytest
from triton_helpers import assert_fits, compile_kernel, needs_compiler, needs_triton

TYPES = {
    "mean_ptr": "fp32",
    "exponents_ptr": "i32",
    "bounds_ptr": "fp32",
    "halves_ptr": "fp32",
    "codes16_ptr": "fp16",
    "codes32_ptr": "fp32",
    "indices_ptr": "i64",
    "limits_ptr": "fp32",
    "undecided_ptr": "i32",
    "num_undecided_ptr": "i32",
}


def compile_search(width: int, num_codes: int, capability: int, kind: str, dtype: str) -> Any:
    from fastvq.kernels import nearest_code as kernels

    kernel = kernels._rescore_kernel if kind == "rescore" else kernels._search_kernel
    tiles = (kernels.rescore_tiles if kind == "rescore" else kernels.search_tiles)(width, num_codes, capability)
    constants: dict[str, Any] = {
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_D": tiles.block_d,
        "CHUNKS": -(-width // tiles.block_d),
    }
    if kind != "rescore":
        constants["EXACT"] = kind == "exact"
    types = {"x_ptr": dtype, **{name: value for name, value in TYPES.items() if name in kernel.arg_names}}
    divisible = tuple({"x_stride_h", "x_stride_n", "width", "padded"} & set(kernel.arg_names))
    return compile_kernel(
        kernel, capability, types, constants, warps=tiles.warps, stages=tiles.stages, divisible=divisible
    )


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("capability", "width", "dtype", "kinds"),
    [
        (90, 64, "fp32", "exact fast rescore"),
        (90, 128, "bf16", "exact"),
        (90, 256, "fp32", "exact rescore"),
        (90, 512, "fp32", "exact"),
        (80, 128, "fp32", "exact"),
        (80, 256, "bf16", "rescore"),
        (80, 512, "fp32", "rescore"),
        (100, 64, "fp32", "rescore"),
        (100, 256, "fp32", "exact"),
        (100, 512, "bf16", "rescore"),
    ],
)
def test_compiled_search_fits_the_chip(capability: int, width: int, dtype: str, kinds: str) -> None:
    for kind in kinds.split():
        resources = compile_search(width, 8192, capability, kind, dtype)
        assert_fits(resources, capability)
        # Blocks of 32 vectors are too small for the larger instructions.
        small = kind == "rescore" and width > 256
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[80 if small else capability]
        assert instruction in resources.ptx
        if capability == 90 and width <= 128 and kind != "rescore":
            # Two programs of 8 warps share a multiprocessor's 64 Ki registers and 228 KiB of shared memory.
            assert resources.registers <= 128
            assert 2 * (resources.shared + 1024) <= 228 * 1024


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_preparation_and_statistics_fit_the_chip(capability: int) -> None:
    from fastvq.kernels import code_statistics, scaled_codes

    ready = {name: TYPES[name] for name in ("exponents_ptr", "bounds_ptr", "halves_ptr", "codes16_ptr", "codes32_ptr")}
    tables, sums = {"codebook_ptr": "fp32", "tables_ptr": "i32"}, {"sums_ptr": "fp32", "counts_ptr": "i32"}
    centre = {**tables, **sums, "x_ptr": "bf16", "mean_ptr": "fp32", "bins_ptr": "i32"}
    given = {"x_ptr": "bf16", "sums_ptr": "fp32", "counts_ptr": "i64"}
    pointers = {
        **given,
        "codebook_ptr": "fp32",
        "indices_ptr": "i64",
        "mask_ptr": "u8",
        "errors_ptr": "fp32",
        "keys_ptr": "i32",
    }
    for kernel, types, constants in (
        *(
            part
            for block, width in ((32, 128), (16, 512))
            for part in (
                (scaled_codes._lengths_kernel, tables, {"BLOCK_K": block, "BLOCK_D": width}),
                (
                    scaled_codes._short_sums_kernel,
                    {**tables, **sums},
                    {"SUM_ROWS": 512, "BLOCK_K": block, "BLOCK_D": width},
                ),
                (scaled_codes._centre_kernel, centre, {"BLOCK_K": block, "BLOCK_D": width}),
                (
                    scaled_codes._prepare_kernel,
                    {**tables, **ready, "mean_ptr": "fp32", "bins_ptr": "i32"},
                    {"BLOCK_K": block, "BLOCK_D": width},
                ),
            )
        ),
        (code_statistics._statistics_kernel, pointers, {"MASKED": True, "ATOMIC": True, "BLOCK_N": 32, "BLOCK_D": 32}),
        (
            code_statistics._segment_sum_kernel,
            {**given, "order_ptr": "i64", "ends_ptr": "i64"},
            {"BLOCK_N": 32, "BLOCK_D": 32},
        ),
    ):
        assert_fits(compile_kernel(kernel, capability, types, constants, warps=4), capability)
