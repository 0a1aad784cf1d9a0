"""The checksum kernel: in the interpreter, on a GPU, and compiled for three chips."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import (
    Check,
    assert_fits,
    checked_in_both,
    compile_kernel,
    needs_compiler,
    needs_triton,
    serve,
)

# Longer than what one program reads, and not a whole number of words.
_BYTES = 8 * 33_000 + 5


def reads_every_byte(device: str) -> None:
    from fastvq.kernels.checksum import Checksum

    block = torch.arange(_BYTES, device=device).to(torch.uint8)
    checksum = Checksum([block])
    first = checksum()
    assert checksum() == first
    seen = {first}
    for place in (0, 1, 7, 8, 8191, 8192, 8 * 32768 - 1, 8 * 32768, _BYTES - 6, _BYTES - 5, _BYTES - 1):
        block[place] ^= 1
        seen.add(checksum())
        block[place] ^= 1
    assert len(seen) == 12
    assert checksum() == first


def reads_from_every_address(device: str) -> None:
    from fastvq.kernels.checksum import Checksum

    memory = torch.zeros(64, dtype=torch.uint8, device=device)
    for offset in range(8):
        for count in (1, 3, 9, 21):
            checksum = Checksum([memory[offset : offset + count]])
            first = checksum()
            memory[:offset] += 1
            memory[offset + count :] += 1
            assert checksum() == first, f"bytes outside count: {offset}, {count}"
            memory[offset + count - 1] += 1
            last = checksum()
            memory[offset] += 1
            assert len({first, last, checksum()}) == 3, f"{offset}, {count}"


def notices_what_trades_places(device: str) -> None:
    from fastvq.kernels.checksum import Checksum

    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        values = torch.ones(70_000, device=device, dtype=dtype)
        values[3] = 2
        checksum = Checksum([values.view(torch.uint8)])
        seen = {checksum()}
        # Also as far apart as the lanes, the steps and the chunks of the kernel.
        places = (2, 4, 4 + 512, 3 + 1024, 3 + 2048, 3 + 8192, 3 + 32_768, 3 + 65_536, 69_999)
        for place in places:
            values[[3, place]] = values[[place, 3]]
            seen.add(checksum())
            values[[3, place]] = values[[place, 3]]
        assert len(seen) == len(places) + 1, dtype


def tells_blocks_apart(device: str) -> None:
    from fastvq.kernels.checksum import Checksum

    one = torch.full((100,), 1, dtype=torch.uint8, device=device)
    two = torch.full((100,), 2, dtype=torch.uint8, device=device)
    checksum = Checksum([one, two])
    first = checksum()
    one.fill_(2)
    two.fill_(1)
    assert checksum() != first


GROUPS: dict[str, dict[str, Check]] = {
    "checksum": {
        "every-byte": reads_every_byte,
        "every-address": reads_from_every_address,
        "swaps": notices_what_trades_places,
        "blocks": tells_blocks_apart,
    }
}


test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_checksum_fits_the_chip(capability: int) -> None:
    from fastvq.kernels import checksum

    resources = compile_kernel(
        checksum._checksum_kernel,
        capability,
        {"chunks_ptr": "i64", "total_ptr": "i64"},
        {"BLOCK": checksum._BLOCK},
        warps=4,
    )
    assert_fits(resources, capability)


if __name__ == "__main__":
    serve(GROUPS)
