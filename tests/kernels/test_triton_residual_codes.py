"""The Triton kernels of residual codes: every level against the criterion of nearest code, in the interpreter and on a
GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from test_triton_nearest_code import DATA as ONE_LEVEL
from test_triton_nearest_code import assert_exact, assert_fast, assert_no_worse, normal
from torch import Tensor
from triton_helpers import Check, checked_in_both, serve

UNIT = 2.0**-24
Data = tuple[Tensor, Tensor, Tensor | None]
Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def statistics(
    x: Tensor, codebooks: Tensor, depths: Tensor | None = None, *, mode: str = "exact", deterministic: bool = False
) -> Found:
    from fastvq.kernels import residual_codes as kernels

    return kernels.residual_codes_statistics(x, codebooks, depths, mode=mode, deterministic=deterministic)


def codes(x: Tensor, codebooks: Tensor, depths: Tensor | None = None, *, mode: str = "exact") -> tuple[Tensor, Tensor]:
    from fastvq.kernels import residual_codes as kernels

    return kernels.residual_codes(x, codebooks, depths, mode=mode)


def random_data(n: int, q: int, k: int, d: int, *, dtype: torch.dtype = torch.float32) -> Data:
    """Codebooks as training leaves them: codes as long as what is left for their level."""
    shrink = 0.6 ** torch.arange(q)[:, None, None]
    return normal(n, d).to(dtype), (normal(q, k, d, seed=1) * shrink).to(dtype), None


def partly(n: int, q: int, k: int, d: int) -> Data:
    x, codebooks, _ = random_data(n, q, k, d)
    return x, codebooks, torch.arange(n) // 3 % (q + 2)


def shared(n: int, q: int, k: int, d: int) -> Data:
    x, codebooks, _ = random_data(n, 1, k, d)
    return x, codebooks.expand(q, -1, -1), None


def hard(name: str) -> Data:
    """Data of one level, and a level of much shorter codes."""
    x, codebook = ONE_LEVEL[name]()
    return x[0, :64], torch.stack([codebook[0], codebook[0].flip(0) * 0.1]), None


DATA: dict[str, Callable[[], Data]] = {
    "ragged": lambda: random_data(70, 3, 70, 24),
    "single-vector": lambda: random_data(1, 4, 37, 24),
    "single-code": lambda: random_data(20, 2, 1, 8),
    "single-level": lambda: random_data(70, 1, 20, 17),
    "width-1": lambda: random_data(70, 3, 20, 1),
    "width-130": lambda: random_data(40, 2, 100, 130),
    "width-256": lambda: random_data(33, 2, 65, 256),
    "bfloat16": lambda: random_data(40, 3, 40, 24, dtype=torch.bfloat16),
    "some-levels": lambda: partly(70, 3, 40, 24),
    "shared": lambda: shared(40, 4, 40, 24),
}
HARD = ("near-ties", "graded-ties", "duplicates", "one-code", "offset", "one-far", "far-vectors", "heavy-tailed")


def residuals(x: Tensor, codebooks: Tensor, indices: Tensor) -> list[Tensor]:
    """r_0 to r_Q of the codes that were found, in float32 as the kernels have them."""
    found = [x.float().cpu()]
    for level, codebook in enumerate(codebooks.float().cpu()):
        index = indices[:, level].cpu()
        code = torch.where((index >= 0)[:, None], codebook[index.clamp(min=0)], 0)
        found.append(found[-1] - code)
    return found


def assert_levels(data: Data, found: Found, *, mode: str = "exact") -> None:
    """Every level's indices by the criterion of its mode; its statistics against float64."""
    x, codebooks, depths = data
    errors, sums, counts, total, indices = (value.cpu() for value in found)
    left = residuals(x, codebooks, indices)
    assert (indices.dtype, counts.dtype, total.dtype) == (torch.int64, torch.int64, torch.float32)
    added = torch.zeros_like(total)
    for level, codebook in enumerate(codebooks.float().cpu()):
        present = torch.ones(len(x), dtype=torch.bool) if depths is None else level < depths.cpu()
        assert (indices[:, level][~present] == -1).all()
        rows, index = left[level][present], indices[:, level][present]
        if mode == "exact":
            assert_exact(rows[None], codebook[None], index[None])
        else:
            assert_fast(rows[None], codebook[None], index[None])
        assert torch.equal(counts[level], torch.bincount(index, minlength=len(codebook)))
        plain = torch.zeros(codebook.shape).index_add_(0, index, rows)
        assert_no_worse(sums[level], plain, torch.zeros(codebook.shape).double().index_add_(0, index, rows.double()))
        exact = left[level + 1][present].double().square().sum()
        assert (errors[level].double() - exact).abs() <= (3 + math.log2(max(2, rows.numel()))) * UNIT * exact
        added[present] += codebook[index]
    assert torch.equal(total, added)


def check_data(make: Callable[[], Data], *, ordered: bool = True) -> Check:
    def check(device: str) -> None:
        x, codebooks, depths = (None if value is None else value.to(device) for value in make())
        assert x is not None
        assert codebooks is not None
        data = x, codebooks, depths
        assert_levels(data, statistics(*data))
        if ordered:
            assert_levels(data, statistics(*data, deterministic=True))

    return check


def check_fast(device: str) -> None:
    x, codebooks, depths = DATA["ragged"]()
    data = x.to(device), codebooks.to(device), depths
    assert_levels(data, statistics(*data, mode="fast"), mode="fast")


def check_undecided_vectors_matter(device: str) -> str:
    """Otherwise the data would not show that exact mode scores again."""
    x, codebooks, _ = hard("near-ties")
    data = x.to(device), codebooks.to(device)
    different = (codes(*data)[1] != codes(*data, mode="fast")[1]).sum().item()
    assert different > 0
    return f"fast chose another code {different} times"


def check_not_finite(device: str) -> None:
    x, codebooks, _ = random_data(50, 3, 40, 24)
    x[3, 0], x[40, 23] = math.nan, math.inf
    codebooks[1, 4, 2], codebooks[2, 0, 3] = math.nan, -math.inf
    for deterministic in (False, True):
        errors, sums, counts, _, indices = statistics(
            x.to(device), codebooks.to(device), deterministic=deterministic
        )  # fmt: skip
        assert indices[[3, 40]].count_nonzero() == 0
        assert counts.sum(1).tolist() == [48, 48, 48]
        assert (counts[1, 4], counts[2, 0]) == (0, 0)
        assert sums.isfinite().all()
        assert not errors.isfinite().any()


def check_empty(device: str) -> None:
    x, codebooks = torch.empty(0, 8, device=device), torch.ones(3, 5, 8, device=device)
    for deterministic in (False, True):
        errors, sums, counts, total, indices = statistics(x, codebooks, deterministic=deterministic)
        assert errors.tolist() == [0, 0, 0]
        assert (sums.count_nonzero(), counts.sum()) == (0, 0)
        assert (total.shape, indices.shape) == ((0, 8), (0, 3))


def check_layouts(device: str) -> None:
    x, codebooks, depths = (None if value is None else value.to(device) for value in DATA["some-levels"]())
    assert x is not None
    assert codebooks is not None
    expected = statistics(x, codebooks, depths, deterministic=True)
    turned = statistics(x.T.contiguous().T, codebooks.mT.contiguous().mT, depths, deterministic=True)
    beside = statistics(torch.cat([x, x], 1)[:, :24], torch.cat([codebooks, codebooks], 2)[..., 24:], depths)
    assert all(torch.equal(value, want) for value, want in zip(turned, expected, strict=True))
    assert torch.equal(beside[4], expected[4])


def check_operation(device: str) -> None:
    from fastvq.ops import explain_backend, residual_codes_statistics

    x, codebooks, _ = (None if value is None else value.to(device) for value in DATA["ragged"]())
    assert x is not None
    assert codebooks is not None
    found = residual_codes_statistics(x, codebooks, backend="triton", deterministic=True)
    for value, want in zip(found, reversed(statistics(x, codebooks, deterministic=True)), strict=False):
        assert value.shape == want.shape
    total, indices = codes(x, codebooks)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.quantized, total)
    wide = explain_backend("residual_codes", x.new_zeros(2, 300), x.new_zeros(2, 3, 300))
    assert "triton: it takes vectors of 1 to 256 elements, not 300" in wide


GROUPS: dict[str, dict[str, Check]] = {
    "data": {name: check_data(make) for name, make in DATA.items()},
    "hard": {name: check_data(functools.partial(hard, name), ordered=False) for name in HARD},
    "other": {
        "fast": check_fast,
        "undecided": check_undecided_vectors_matter,
        "not-finite": check_not_finite,
        "empty": check_empty,
        "layouts": check_layouts,
        "operation": check_operation,
    },
}

if __name__ == "__main__":
    serve(GROUPS)
else:
    test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)
