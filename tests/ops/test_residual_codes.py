"""Codes of all levels in one pass against the levels one after the other, bit for bit on a CPU."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from helpers import refuses
from nearest_code_data import DATA, normal
from torch import Tensor

from fastvq import _engine
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops import (
    ResidualStatistics,
    explain_backend,
    nearest_code_statistics,
    residual_codes,
    residual_codes_statistics,
)
from fastvq.ops.residual_codes.cpp import cpp_statistics

pytestmark = pytest.mark.usefixtures("steady")

needs_engine = pytest.mark.skipif(not _engine.available(), reason="the extension is not built")


def in_turn(x: Tensor, codebooks: Tensor, depths: Tensor | None = None) -> ResidualStatistics:
    """Calls of the public operation for one level, and plain subtraction."""
    residual, total = x.float(), torch.zeros(x.shape)
    found, indices = [], []
    for level, codebook in enumerate(codebooks):
        mask = None if depths is None else depths > level
        found.append(nearest_code_statistics(residual, codebook, mask=mask))
        code = codebook.float()[found[-1].indices]
        index = found[-1].indices
        if mask is not None:
            code, index = torch.where(mask[:, None], code, 0), torch.where(mask, index, -1)
        indices.append(index)
        residual, total = residual - code, total + code
    counts, sums, errors = (torch.stack([one[i] for one in found]) for i in (1, 2, 3))
    return ResidualStatistics(torch.stack(indices, 1), total, counts, sums, errors)


def assert_same(found: ResidualStatistics, expected: ResidualStatistics) -> None:
    for name, value, want in zip(found._fields, found, expected, strict=True):
        assert value.dtype == want.dtype, name
        assert torch.equal(value.nan_to_num(7.0), want.nan_to_num(7.0)), name


def shrinking(levels: int, codes: int, width: int) -> Tensor:
    """Codebooks as training leaves them: each level's codes are as long as what is left for it."""
    return normal(levels, codes, width, seed=1) * 0.6 ** torch.arange(levels)[:, None, None]


# N, Q, K, D: one vector of registers and parts of one; enough vectors to be added up in parts.
SHAPES = [(1, 1, 1, 1), (300, 3, 40, 20), (1000, 8, 130, 33), (2100, 4, 256, 64), (33000, 2, 9, 7), (0, 3, 4, 5)]


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("partly", [False, True], ids=["all", "some-levels"])
def test_one_pass_has_the_bits_of_the_levels_in_turn(
    shape: tuple[int, int, int, int], dtype: torch.dtype, partly: bool
) -> None:
    rows, levels, codes, width = shape
    x, codebooks = normal(rows, width).to(dtype), shrinking(levels, codes, width)
    depths = torch.arange(rows) // 37 % (levels + 1) if partly else None
    expected = in_turn(x, codebooks, depths)
    found = residual_codes_statistics(x, codebooks, depths=depths, backend="cpp")
    assert_same(found, expected)
    assert_same(residual_codes_statistics(x, codebooks, depths=depths, backend="levels"), expected)
    alone = residual_codes(x, codebooks, depths=depths, backend="cpp")
    assert torch.equal(alone.indices, expected.indices)
    assert torch.equal(alone.quantized, expected.quantized)
    for threads in (1, 2, 3, 5):
        errors, sums, counts, total, indices = cpp_statistics(x, codebooks, depths, threads=threads)
        assert_same(ResidualStatistics(indices, total, counts, sums, errors), expected)


@needs_engine
@pytest.mark.parametrize("data", DATA)
def test_one_pass_on_hard_data(data: str) -> None:
    x, codebook = DATA[data](700, 120, 24)
    codebooks = torch.stack([codebook, codebook.flip(0) * 0.5, codebook * 0.1])
    assert_same(residual_codes_statistics(x, codebooks, backend="cpp"), in_turn(x, codebooks))


@needs_engine
def test_a_shared_codebook_is_not_copied() -> None:
    x, codebook = normal(900, 24), normal(70, 24, seed=1)
    codebooks = codebook.expand(5, -1, -1)
    assert_same(residual_codes_statistics(x, codebooks, backend="cpp"), in_turn(x, codebooks))


@needs_engine
@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_vectors_and_codes_that_are_not_finite(strange: float) -> None:
    x, codebooks = normal(200, 12), shrinking(3, 20, 12)
    x[[3, 50], [0, 7]] = strange
    codebooks[1, 4, 2] = strange
    codebooks[2, 0, 3] = strange
    found = residual_codes_statistics(x, codebooks, backend="cpp")
    assert_same(found, in_turn(x, codebooks))
    assert found.counts.sum(1).tolist() == [198, 198, 198]
    assert found.sums.isfinite().all()


@pytest.mark.parametrize("backend", ["levels", "torch", None])
def test_plain_pytorch_agrees(backend: str | None) -> None:
    x, codebooks = normal(400, 16, dtype=torch.float64), shrinking(4, 50, 16)
    depths = torch.arange(400) % 5
    wide = residual_codes_statistics(x, codebooks.double(), depths=depths, backend=backend)
    assert wide.sums.dtype == wide.quantized.dtype == torch.float64
    narrow = residual_codes_statistics(x.float(), codebooks, depths=depths, backend="torch")
    assert torch.equal(wide.indices, narrow.indices)
    for value, want in zip(narrow[1:], wide[1:], strict=True):
        torch.testing.assert_close(value.double(), want.double(), rtol=1e-5, atol=1e-4)


@needs_engine
def test_memory_of_any_layout() -> None:
    x, codebooks = normal(50, 24), shrinking(3, 20, 24)
    expected = in_turn(x, codebooks)
    apart = torch.zeros(50, 48)
    apart[:, ::2] = x
    for vectors in (x.T.contiguous().T, apart[:, ::2], torch.cat([x, x], 1)[:, :24]):
        assert_same(residual_codes_statistics(vectors, codebooks.mT.contiguous().mT, backend="cpp"), expected)


@pytest.mark.parametrize("partly", [False, True], ids=["all", "some-levels"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_the_squared_errors(partly: bool, dtype: torch.dtype) -> None:
    x, codebooks = normal(30, 6, dtype=dtype).requires_grad_(), shrinking(3, 10, 6).to(dtype)
    depths = torch.arange(30) % 4 if partly else None
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    found = residual_codes_statistics(x, codebooks, depths=depths)
    (got,) = torch.autograd.grad(found.squared_errors @ weights, x)
    residual, expected = x.detach(), torch.zeros_like(x)
    for level in range(3):
        present = (found.indices[:, level] >= 0)[:, None]
        code = codebooks[level][found.indices[:, level].clamp(min=0)]
        residual = torch.where(present, residual - code, residual)
        expected += torch.where(present, 2 * weights[level] * residual, 0)
    torch.testing.assert_close(got, expected)
    assert not found.quantized.requires_grad
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(
            lambda x: residual_codes_statistics(x, codebooks, depths=depths).squared_errors, x
        )


@pytest.mark.parametrize("grad", [False, True], ids=["values", "gradients"])
def test_opcheck(grad: bool) -> None:
    x, codebooks, ops = normal(20, 6), shrinking(3, 10, 6), torch.ops.fastvq
    depths = torch.arange(20) % 4
    torch.library.opcheck(ops.residual_codes, (x, codebooks, None, "exact", None))
    x.requires_grad_(grad)
    torch.library.opcheck(ops.residual_codes_statistics, (x, codebooks, depths, "exact", False, None))
    torch.library.opcheck(ops.residual_codes_statistics, (x, codebooks, None, "fast", True, "torch"))


def test_compiles_without_a_break() -> None:
    x, codebooks = normal(64, 8), shrinking(3, 10, 8)
    compiled = torch.compile(residual_codes_statistics, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x, codebooks), residual_codes_statistics(x, codebooks))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ArgumentError, "x: expected shape [N, D], got [3]"),
        ({"codebooks": torch.zeros(5, 4)}, ArgumentError, "codebooks: expected shape [Q, K, 4]"),
        ({"codebooks": torch.zeros(2, 5, 3)}, ArgumentError, "codebooks: expected shape [Q, K, 4]"),
        (
            {"codebooks": torch.zeros(0, 5, 4)},
            ArgumentError,
            "codebooks: expected shape [Q, K, 4] with Q and K of 1 or more, got [0",
        ),
        ({"codebooks": torch.zeros(2, 5, 4).requires_grad_()}, ArgumentError, "codebooks: expected a tensor without"),
        ({"depths": torch.zeros(3)}, ArgumentTypeError, "depths: expected integers, got torch.float32"),
        ({"depths": torch.zeros(2, dtype=torch.int64)}, ArgumentError, "depths: expected shape [3], got [2]"),
        ({"mode": "slow"}, ArgumentError, "mode: expected"),
        ({"backend": "cuda"}, ArgumentError, "backend: expected None or one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(3, 4), "codebooks": torch.zeros(2, 5, 4), **changes}
    with refuses(error, re.escape(message)):
        residual_codes_statistics(**given)


def test_transforms_are_refused() -> None:
    codebooks = shrinking(2, 5, 4)
    with refuses(UnavailableError, "residual_codes: transforms of torch.func"):
        torch.func.vmap(lambda x: residual_codes(x, codebooks).indices)(normal(2, 3, 4))


@needs_engine
def test_explains_its_choice() -> None:
    x, codebooks = normal(3, 4), shrinking(2, 5, 4)
    told = explain_backend("residual_codes", x, codebooks).splitlines()
    assert told[:2] == ["cpp: chosen: the first that can run", "levels: could run, not chosen"]
    told = explain_backend("residual_codes", x.double(), codebooks).splitlines()
    assert told[0] == "cpp: it computes in float32, and the tensors are float64"
    assert told[1] == "levels: chosen: the first that can run"
