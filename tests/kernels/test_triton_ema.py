"""The Triton kernel of the EMA update: in the interpreter, on a GPU, and compiled for three chips."""

from __future__ import annotations

import functools
from typing import Any

import ema_checks as checks
import pytest
import torch
from triton_helpers import (
    Check,
    Launch,
    Recorder,
    assert_fits,
    assert_read_before_written,
    checked_in_both,
    needs_compiler,
    needs_triton,
    serve,
)

from fastvq.ops import ema_update, ema_update_reference, explain_backend

# What one program moves, in blocks with ragged ends; and what many do, in two launches.
SHAPES = [*checks.SHAPES, (512, 64), (300, 130)]


def on(check: Any, *given: Any) -> Check:
    return lambda device: check("triton", *given, device=device)


def check_agrees_with_the_reference(device: str) -> None:
    counts, sums, state = checks.case(2, 67, 33, device=device)
    other = checks.copies(state)
    ema_update(counts, sums, **state, decay=0.97, eps=1e-4, backend="triton")
    ema_update_reference(counts, sums, **other, decay=0.97, eps=1e-4, skip_unusable=False)
    for name in state:
        torch.testing.assert_close(state[name], other[name], rtol=2e-6, atol=1e-6)


def check_is_chosen_on_a_gpu(device: str) -> None:
    counts, sums, state = checks.case(13, 5, device=device)
    lines = explain_backend("ema_update", counts, sums, *state.values()).splitlines()
    assert lines[0].split(":")[0] == ("triton" if device == "cuda" else "cpp")
    assert any(line.startswith("triton: c") for line in lines)
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in state.items()}
    lines = explain_backend("ema_update", counts, sums, *strided.values()).splitlines()
    assert "triton: it moves contiguous buffers" in lines


def check_several(device: str) -> None:
    """Codebooks that lie apart move as they do alone, to the bit; small ones, and ones that several programs move."""
    from fastvq.ops.ema_update.options import Options
    from fastvq.ops.ema_update.triton import triton_ema_update, triton_ema_updates

    options = Options(0.9, 1e-4, True, None)
    for shape in ((13, 5), (1030, 70)):
        counts, sums, together = checks.case(3, *shape, device=device)
        counts[1] = 0
        apart = [[value[head].clone() for value in together.values()] for head in range(3)]
        triton_ema_update(counts, sums, *together.values(), options)
        triton_ema_updates(counts, sums, apart, options)
        for head, buffers in enumerate(apart):
            for name, value in zip(together, buffers, strict=True):
                assert torch.equal(value.nan_to_num(-7), together[name][head].nan_to_num(-7))


def check_empty(device: str) -> None:
    counts, sums, state = checks.case(1, 3, 4, device=device)
    none = {name: value[:0] for name, value in state.items()}
    ema_update(counts[:0], sums[:0], **none, decay=0.9, backend="triton")


GROUPS: dict[str, dict[str, Check]] = {
    "update": {
        **{
            f"{'x'.join(map(str, shape))}-{decay}": on(checks.check_float64, shape, decay)
            for shape in SHAPES
            for decay in checks.DECAYS
        },
        "large-0.3": on(checks.check_float64, (3, 1030, 70), 0.3),
        "arguments-left-alone": on(checks.check_arguments_left_alone),
        **{
            f"counts-{str(dtype)[6:]}": on(checks.check_counts_of_type, dtype)
            for dtype in (torch.float32, torch.int32, torch.uint8)
        },
        "strided-sums": on(checks.check_strided_sums),
        "no-counts-at-all": on(checks.check_no_counts_at_all),
        **{f"unusable-{bad}": on(checks.check_unusable, bad) for bad in ("empty", "nan", "inf")},
        "unusable-large": on(checks.check_unusable, "nan", (3, 1030, 70)),
        "autograd-is-told": on(checks.check_autograd_is_told),
        "agrees-with-the-reference": check_agrees_with_the_reference,
        "is-chosen-on-a-gpu": check_is_chosen_on_a_gpu,
        "several": check_several,
        "empty": check_empty,
    },
}

test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


@functools.cache
def launches(num_codes: int, width: int) -> tuple[Launch, ...]:
    """What an update would launch."""
    from fastvq.kernels import ema

    found: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "_update_kernel", Recorder(ema._update_kernel, found))
        counts, sums, state = checks.case(num_codes, width)
        ema._plan.cache_clear()  # type: ignore[attr-defined]
        ema.ema_update(counts, sums, **state, decay=0.99, eps=1e-5, skip_unusable=True)
        ema._plan.cache_clear()  # type: ignore[attr-defined]
    return tuple(found)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("num_codes", "width"), [(512, 64), (1, 1), (8192, 64), (1024, 300)])
def test_launches(num_codes: int, width: int) -> None:
    """One where one program moves a codebook."""
    assert len(launches(num_codes, width)) == (1 if num_codes * width <= 65536 else 2)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("num_codes", "width"), [(512, 64), (8192, 256)])
def test_compiled_update_fits_the_chip(capability: int, num_codes: int, width: int) -> None:
    for launch in launches(num_codes, width):
        assert_fits(launch.compile(capability), capability)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("num_codes", "width"), [(512, 64), (8192, 64), (1, 1)])
def test_all_warps_read_before_one_writes_in_place(num_codes: int, width: int) -> None:
    """The launch that moves a codebook, which is the last."""
    assert_read_before_written(launches(num_codes, width)[-1].compile(90), "f32")


if __name__ == "__main__":
    serve(GROUPS)
