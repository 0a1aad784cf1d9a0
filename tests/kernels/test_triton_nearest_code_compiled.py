"""The Triton kernels of nearest code, compiled for three chips as they would be launched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from triton_helpers import Launch, Recorder, assert_fits, assert_read_before_written, needs_compiler, needs_triton


def forget_plans() -> None:
    """They hold kernels and what is known of a device."""
    from fastvq.kernels import code_statistics, nearest_code

    nearest_code._plan.cache_clear()  # type: ignore[attr-defined]
    code_statistics._plan.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What is launched, instead of launching it."""
    from fastvq.kernels import code_statistics, nearest_code, scaled_codes

    found: list[Launch] = []
    for module, name in (
        (scaled_codes, "_prepare_kernel"),
        (nearest_code, "_search_kernel"),
        (nearest_code, "_crowded_kernel"),
        (code_statistics, "_statistics_kernel"),
        (code_statistics, "_segment_sum_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    forget_plans()
    yield found
    forget_plans()


def pretend(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvq.kernels import nearest_code
    from fastvq.kernels.launch import Device

    forget_plans()
    monkeypatch.setattr(nearest_code, "hardware", lambda device: Device(capability, 132))


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("capability", "width", "dtype", "modes"),
    [
        (90, 64, torch.float32, "exact fast"),
        (90, 128, torch.bfloat16, "exact"),
        (90, 256, torch.float32, "exact"),
        (90, 512, torch.float32, "exact"),
        (80, 128, torch.float32, "exact"),
        (80, 256, torch.bfloat16, "exact"),
        (80, 512, torch.float32, "exact"),
        (100, 64, torch.float32, "exact"),
        (100, 256, torch.float32, "exact"),
        (100, 512, torch.bfloat16, "exact"),
    ],
    ids=str,
)
def test_compiled_search_fits_the_chip(
    capability: int,
    width: int,
    dtype: torch.dtype,
    modes: str,
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastvq.kernels import nearest_code

    pretend(capability, monkeypatch)
    x, codes = torch.empty(1, 4096, width, dtype=dtype), torch.empty(1, 8192, width)
    for mode in modes.split():
        launches.clear()
        nearest_code.nearest_code(x, codes, mode=mode)
        _, searched, settled = launches
        assert_fits(settled.compile(capability), capability)
        resources = searched.compile(capability)
        assert_fits(resources, capability)
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        assert instruction in resources.ptx
        # As many programs as are meant to share a multiprocessor have its 64 Ki registers and its shared memory.
        tiles = nearest_code.search_tiles(width, 8192, capability)
        assert tiles.programs * tiles.warps * 32 * resources.registers <= 64 * 1024
        assert tiles.programs * (resources.shared + 1024) <= (164 if capability == 80 else 228) * 1024


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("num_codes", "width"), [(512, 64), (8192, 128), (300, 512)])
def test_compiled_preparation_and_statistics_fit_the_chip(
    capability: int, num_codes: int, width: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvq.kernels import nearest_code

    pretend(capability, monkeypatch)
    x, codes = torch.zeros(1, 4096, width, dtype=torch.bfloat16), torch.zeros(1, num_codes, width)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    for given, deterministic in ((None, False), (mask, True)):
        nearest_code.nearest_code_statistics(x, codes, given, mode="exact", deterministic=deterministic)
    compiled = [launch for launch in launches if launch.kernel.__name__ not in ("_search_kernel", "_crowded_kernel")]
    # The second preparation is the first again.
    assert len(compiled) == 5
    for launch in (compiled[0], compiled[1], compiled[3], compiled[4]):
        resources = launch.compile(capability)
        assert_fits(resources, capability)
        if launch.kernel.__name__ == "_statistics_kernel":
            # The indices are put right in place.
            assert_read_before_written(resources, "i64")
