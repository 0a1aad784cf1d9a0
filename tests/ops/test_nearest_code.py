"""Nearest codes against float64 on easy and on hard data, and the statistics that come with them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refuses
from nearest_code_data import DATA, normal
from torch import Tensor

from fastvq import _engine
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops import explain_backend, nearest_code, nearest_code_statistics
from fastvq.ops.nearest_code import reference
from fastvq.ops.nearest_code.cpp import cpp_indices, cpp_statistics

pytestmark = pytest.mark.usefixtures("steady")

NAN, INF = math.nan, math.inf
UNIT = 2.0**-24
HALVES = (torch.bfloat16, torch.float16)
NEEDS = {"avx512": "avx512bw", "avx2": "avx2", "baseline": None}


def _instruction_sets() -> list[Any]:
    found = _engine.require().build_info()["instruction_sets"] if _engine.available() else []
    reasons = {name: feature is not None and feature not in found for name, feature in NEEDS.items()}
    missing = not _engine.available()
    return [
        pytest.param(name, marks=pytest.mark.skipif(missing or lacks, reason=f"the processor or build has no {name}"))
        for name, lacks in reasons.items()
    ]


# Every implementation that this machine can run: the C++ one with each instruction set, and plain PyTorch.
IMPLEMENTATIONS = [*_instruction_sets(), "torch"]


def indices_of(implementation: str, x: Tensor, codebook: Tensor) -> Tensor:
    if implementation == "torch":
        return nearest_code(x, codebook, backend="torch")
    return cpp_indices(x[None], codebook[None], kernels=implementation)[0]


def statistics_of(
    implementation: str, x: Tensor, codebook: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared error, sums, counts, indices."""
    if implementation == "torch":
        found = nearest_code_statistics(x, codebook, mask=mask, backend="torch")
        return found.squared_error, found.sums, found.counts, found.indices
    outputs = cpp_statistics(x[None], codebook[None], None if mask is None else mask[None], kernels=implementation)
    return tuple(value[0] for value in outputs)  # type: ignore[return-value]


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """float64 [N, K], differences first: nothing cancels."""
    parts = x.double().split(512)
    return torch.cat([(part[:, None] - codebook.double()).square().sum(-1) for part in parts])


def assert_nearest(x: Tensor, codebook: Tensor, found: Tensor) -> float:
    """Asserts the accuracy that is promised; returns the share of vectors too close to call."""
    distances, lengths = squared_distances(x, codebook), codebook.double().norm(dim=1)
    two = distances.topk(min(2, codebook.shape[0]), largest=False)
    constant = 16 * max(1.0, math.sqrt(x.shape[1] / 256)) * UNIT

    def rounding(*codes: Tensor) -> Tensor:
        """[N]: by how much one of these codes may be mistaken for another."""
        return constant * (x.double().norm(dim=1) + lengths[torch.stack(codes)].amax(0)) ** 2

    excess = distances.gather(1, found[:, None])[:, 0] - two.values[:, 0]
    assert (excess <= rounding(found, two.indices[:, 0])).all()
    if codebook.shape[0] == 1:
        assert (found == 0).all()
        return 0.0
    clear = two.values[:, 1] - two.values[:, 0] > rounding(two.indices[:, 0], two.indices[:, 1])
    assert torch.equal(found[clear], two.indices[clear, 0])
    return 1 - float(clear.double().mean())


SHAPES = [(1, 1, 1), (7, 2, 3), (33, 13, 16), (257, 33, 64), (300, 511, 17), (129, 70, 300), (65, 24, 512)]
# So many for so few codes that they are added up in parts.
MANY_VECTORS = (36_011, 29, 33)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_accuracy(implementation: str, data: str, shape: tuple[int, int, int]) -> None:
    x, codebook = DATA[data](*shape)
    unclear = assert_nearest(x, codebook, indices_of(implementation, x, codebook))
    if data in ("random", "clustered", "one-far", "half-far-1e6"):
        assert unclear <= 0.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("data", ["random", "offset-10", "near-ties", "half-far-1e3", "offset-but-a-zero"])
@pytest.mark.parametrize("shape", [(257, 33, 64), (40, 50, 19)], ids=str)
def test_accuracy_of_half_precision(
    implementation: str, dtype: torch.dtype, data: str, shape: tuple[int, int, int]
) -> None:
    """As stored, vectors are what they are: their scores are float32 still."""
    x, codebook = DATA[data](*shape)
    x = x.to(dtype)
    assert_nearest(x, codebook, indices_of(implementation, x, codebook))
    assert_nearest(x, codebook.to(dtype), indices_of(implementation, x, codebook.to(dtype)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_of_half_precision_is_read(implementation: str, dtype: torch.dtype) -> None:
    """A single vector is the sum of its code: subnormal and negative zeros, largest values, all of them."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    sums = statistics_of(implementation, values[None], torch.zeros(1, len(values)))[1]
    assert torch.equal(sums[0], values.float())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("data", ["random", "fresh", "offset-10", "one-far", "half-far-1e5", "offset-but-one-far"])
def test_no_more_mismatches_than_the_plain_formula(implementation: str, data: str) -> None:
    rows, codes, width = 20000, 512, 64
    x, codebook = DATA[data](rows, codes, width)
    # Expanded, but in float64, whose rounding is far below what is counted here.
    wide = codebook.double()
    exact = torch.addmm(wide.square().sum(1) / 2, x.double(), wide.T, alpha=-1).argmin(1)
    plain = x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * x @ codebook.T
    mismatches = int((indices_of(implementation, x, codebook) != exact).sum())
    assert mismatches <= int((plain.argmin(1) != exact).sum())
    assert mismatches <= 2e-4 * rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1e-18, 1e18])
def test_longest_and_shortest_vectors(implementation: str, length: float) -> None:
    """Squares of these lengths are the last that float32 holds."""
    x, codebook = (length * 48**-0.5 * vectors for vectors in (normal(200, 48), normal(50, 48, seed=1)))
    found = indices_of(implementation, x, codebook)
    assert assert_nearest(x, codebook, found) <= 0.01
    assert torch.equal(found, squared_distances(x, codebook).argmin(1))
    codebook[7] = 1e18 if length > 1 else 0
    assert torch.equal(indices_of(implementation, x, codebook), squared_distances(x, codebook).argmin(1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1e-24, 1e20])
def test_lengths_beyond_those_of_float32(implementation: str, length: float) -> None:
    x, codebook = length * normal(50, 48), length * normal(20, 48, seed=1)
    assert (indices_of(implementation, x, codebook) == 0).all()
    # Codes that are too long are as good as none.
    codebook = torch.cat([codebook, normal(20, 48, seed=2)]) if length > 1 else normal(20, 48, seed=2)
    x = normal(50, 48)
    assert torch.equal(indices_of(implementation, x, codebook), squared_distances(x, codebook).argmin(1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lowest_index_among_equals(implementation: str) -> None:
    # Small integers whose mean is one too: every score is exact.
    codebook = torch.tensor([[3.0, 0], [-3, 0], [0, 3], [0, -3], [3, 0], [-3, 0], [0, 3], [0, -3]])
    x = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1], [0, 0], [2, 1], [-2, 1], [1, 2], [1, -2]])
    assert indices_of(implementation, x, codebook).tolist() == [0, 1, 1, 0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("copies", [2, 5])
def test_copies(implementation: str, copies: int) -> None:
    codebook = normal(37, 16, seed=1)
    x = normal(200, 16)
    found = indices_of(implementation, x, codebook.repeat(copies, 1))
    assert torch.equal(found % 37, nearest_code(x, codebook))
    # Libraries compute the last columns of a product in another order.
    assert implementation == "torch" or (found < 37).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_a_code_is_its_own_nearest(implementation: str, offset: float) -> None:
    codebook = offset + normal(512, 64)
    assert torch.equal(indices_of(implementation, codebook, codebook), torch.arange(512))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [*SHAPES, MANY_VECTORS], ids=lambda s: "x".join(map(str, s)))
def test_statistics(implementation: str, dtype: torch.dtype, masked: bool, shape: tuple[int, int, int]) -> None:
    rows, codes, width = shape
    x, codebook = (1 + normal(rows, width)).to(dtype), normal(codes, width, seed=1)
    mask = torch.arange(rows) % 3 != 1 if masked else None
    error, sums, counts, indices = statistics_of(implementation, x, codebook, mask)
    assert torch.equal(indices, indices_of(implementation, x, codebook))
    used = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    one_hot = torch.nn.functional.one_hot(indices, codes).double() * used[:, None]
    assert counts.dtype == torch.int64
    assert torch.equal(counts, one_hot.sum(0).long())
    exact = one_hot.T @ x.double()
    slack = counts[:, None] if implementation == "torch" else 1
    assert ((sums - exact).abs() <= slack * UNIT * (one_hot.T @ x.double().abs())).all()
    gaps = (x.double() - codebook[indices].double()).square().sum(1)
    assert error.item() == pytest.approx(gaps[used].sum().item(), rel=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_of_one_code_that_has_everything(implementation: str) -> None:
    """A chain of float32 additions would lose digits."""
    x = 1 + 0.1 * normal(200_000, 3)
    _, sums, counts, _ = statistics_of(implementation, x, torch.stack([torch.ones(3), torch.full((3,), 100.0)]))
    assert counts.tolist() == [200_000, 0]
    exact = x.double().sum(0)
    plain = torch.zeros(1, 3).index_add_(0, torch.zeros(len(x), dtype=torch.int64), x)[0]
    assert ((sums[0] - exact).abs() <= 2 * (plain - exact).abs() + UNIT * exact).all()
    if implementation != "torch":
        assert ((sums[0] - exact).abs() <= UNIT * exact).all()
    assert (sums[1] == 0).all()


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(5003, 301, 50), MANY_VECTORS], ids=lambda s: "x".join(map(str, s)))
def test_threads_do_not_matter(kernels: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, codes, width = shape
    x, codebook = normal(1, rows, width).to(dtype), normal(1, codes, width, seed=1)
    mask = torch.rand(1, rows) < 0.9
    alone = cpp_statistics(x, codebook, mask, threads=1, kernels=kernels)
    for threads in (2, 3, 7, 16):
        for _ in range(3):
            many = cpp_statistics(x, codebook, mask, threads=threads, kernels=kernels)
            assert all(torch.equal(a, b) for a, b in zip(alone, many, strict=True))
        assert torch.equal(cpp_indices(x, codebook, threads=threads, kernels=kernels), alone[-1])


@pytest.mark.skipif(not _engine.available(), reason="needs the extension")
def test_threads_are_those_of_pytorch() -> None:
    """A second pool would compete with PyTorch's for the cores."""
    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    own = {path for path in loaded if re.search(r"/torch[^/]*/.*lib(g|i?)omp[^/]*$", path)}
    pool = _engine.require().build_info()["thread_pool"]
    if not own:
        pytest.skip(f"PyTorch has brought no OpenMP runtime; the pool is {pool!r}")
    assert os.path.realpath(pool) in {os.path.realpath(path) for path in own}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vectors_that_are_not_finite(implementation: str) -> None:
    x, codebook = normal(40, 5), 0.5 * normal(9, 5, seed=1)
    clean = x.clone()
    bad = torch.tensor([3, 17, 31, 39])
    x[3], x[17, 2], x[31, 0], x[39, 4] = NAN, NAN, INF, -INF
    good = torch.ones(40, dtype=torch.bool)
    good[bad] = False
    error, sums, counts, indices = statistics_of(implementation, x, codebook)
    assert (indices[bad] == 0).all()
    assert torch.equal(indices_of(implementation, x, codebook), indices)
    assert torch.equal(indices[good], indices_of(implementation, clean[good], codebook))
    _, sums_of_good, counts_of_good, _ = statistics_of(implementation, clean[good], codebook)
    assert torch.equal(counts, counts_of_good)
    assert torch.equal(sums, sums_of_good)
    assert not error.isfinite()
    shown = statistics_of(implementation, x, codebook, good)[0]
    assert shown.item() == pytest.approx(statistics_of(implementation, clean[good], codebook)[0].item(), rel=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_codes_that_are_not_finite_are_never_chosen(implementation: str) -> None:
    x, codebook = normal(100, 6), normal(20, 6, seed=1)
    bad = torch.tensor([0, 5, 19])
    good = torch.tensor([k for k in range(20) if k not in bad])
    codebook[0], codebook[5, 3], codebook[19, 0] = NAN, INF, -INF
    assert torch.equal(indices_of(implementation, x, codebook), good[indices_of(implementation, x, codebook[good])])
    nothing = torch.full((3, 6), NAN)
    _, sums, counts, indices = statistics_of(implementation, x, nothing)
    assert (indices == 0).all()
    assert (counts == 0).all()
    assert (sums == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (3, 0)], ids=["no-vectors", "no-elements"])
def test_nothing(implementation: str, rows: int, width: int) -> None:
    if implementation != "torch" and width == 0:
        implementation = "torch"
        assert "no elements" in explain_backend("nearest_code", torch.zeros(3, 0), torch.zeros(5, 0))
    error, sums, counts, indices = statistics_of(implementation, torch.zeros(rows, width), normal(5, width))
    assert indices.tolist() == [0] * rows
    assert counts.tolist() == [rows, 0, 0, 0, 0]
    assert sums.shape == (5, width)
    assert (sums == 0).all()
    assert error.item() == 0


@pytest.mark.parametrize("backend", [None, "torch"])
def test_memory_of_any_layout(backend: str | None) -> None:
    x, codebook = normal(60, 2, 10), normal(2, 7, 20, seed=1)[..., ::2]
    heads = x.transpose(0, 1)
    found = nearest_code_statistics(heads, codebook, backend=backend)
    again = nearest_code_statistics(heads.contiguous(), codebook.contiguous(), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for head in range(2):
        alone = nearest_code_statistics(x[:, head], codebook[head], backend=backend)
        assert torch.equal(found.indices[head], alone.indices)
        assert torch.equal(found.counts[head], alone.counts)
        assert torch.equal(found.sums[head], alone.sums)
        assert torch.equal(found.squared_error[head], alone.squared_error)
    assert torch.equal(nearest_code(heads, codebook, backend=backend), found.indices)
    turned = normal(10, 30).T
    assert torch.equal(nearest_code(turned, codebook[0], backend=backend), nearest_code(turned.clone(), codebook[0]))
    same = normal(1, 10).expand(5, 10)
    assert torch.equal(nearest_code(same, codebook[0], backend=backend), nearest_code(same.clone(), codebook[0]))
    assert nearest_code(torch.zeros(0, 3, 4), torch.zeros(0, 5, 4), backend=backend).shape == (0, 3)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_a_far_code_of_one_head_is_of_no_concern_to_another(backend: str | None) -> None:
    x, codebook = 10 + normal(2, 300, 16), 10 + normal(2, 40, 16, seed=1)
    near = nearest_code(x, codebook, backend=backend)
    codebook[1, 20] = -1e6
    codebook[1, 21] = 1e6
    found = nearest_code(x, codebook, backend=backend)
    assert torch.equal(found[0], near[0])
    assert torch.equal(found[1], squared_distances(x[1], codebook[1]).argmin(1))


@pytest.mark.parametrize("backend", [None, "torch"])
def test_cosine(backend: str | None) -> None:
    x, codebook = normal(200, 12) * torch.rand(200, 1) * 50, normal(30, 12, seed=1) * (0.1 + torch.rand(30, 1))
    exact = torch.nn.functional.cosine_similarity(x.double()[:, None], codebook.double()[None], dim=-1)
    found = nearest_code_statistics(x, codebook, metric="cosine", backend=backend)
    assert torch.equal(found.indices, exact.argmax(1))
    assert torch.equal(nearest_code(x, codebook, metric="cosine", backend=backend), found.indices)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    torch.testing.assert_close(found.sums.double()[0], unit[found.indices == 0].sum(0), rtol=1e-5, atol=1e-5)
    assert found.squared_error.item() == pytest.approx((2 - 2 * exact.amax(1)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_autocast_changes_nothing(backend: str | None) -> None:
    x, codebook = normal(300, 16), normal(40, 16, seed=1)
    plain = nearest_code_statistics(x, codebook, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nearest_code_statistics(x, codebook, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_float64_is_computed_in_float64() -> None:
    x, codebook = 1e6 + normal(200, 8, dtype=torch.float64), 1e6 + normal(64, 8, seed=1, dtype=torch.float64)
    found = nearest_code_statistics(x, codebook)
    assert torch.equal(found.indices, squared_distances(x, codebook).argmin(1))
    assert found.sums.dtype == found.squared_error.dtype == torch.float64
    assert "float64" in explain_backend("nearest_code", x, codebook)
    codebook[5] = 1e14
    assert torch.equal(nearest_code(x, codebook), squared_distances(x, codebook).argmin(1))


def test_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = normal(101, 4), normal(10, 4, seed=1)
    whole = nearest_code(x, codebook, backend="torch")
    for scores in (70, 1):
        monkeypatch.setattr(reference, "_CHUNK_SCORES", scores)
        assert torch.equal(nearest_code(x, codebook, backend="torch"), whole)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradients_of_the_squared_error(masked: bool) -> None:
    x = normal(2, 9, 4, dtype=torch.float64).requires_grad_()
    codebook = normal(2, 5, 4, seed=1, dtype=torch.float64).requires_grad_()
    mask = torch.arange(18).view(2, 9) % 4 != 0 if masked else None

    def error(x: Tensor, codebook: Tensor) -> Tensor:
        return nearest_code_statistics(x, codebook, mask=mask).squared_error

    assert torch.autograd.gradcheck(error, (x, codebook))
    assert torch.autograd.gradgradcheck(error, (x, codebook))
    found = nearest_code_statistics(x, codebook)
    assert found.squared_error.requires_grad
    assert not any(value.requires_grad for value in found[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_kernel_equal_autograd(dtype: torch.dtype) -> None:
    x, codebook = normal(50, 6).to(dtype).requires_grad_(), normal(7, 6, seed=1).requires_grad_()
    found = nearest_code_statistics(x, codebook)
    got = torch.autograd.grad(3 * found.squared_error, (x, codebook))
    want = torch.autograd.grad(3 * (x.float() - codebook[found.indices]).square().sum(), (x, codebook))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert torch.autograd.grad(nearest_code_statistics(x, codebook.detach()).squared_error, x)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(dtype: torch.dtype, grad: bool) -> None:
    x, codebook = normal(2, 9, 4).to(dtype).requires_grad_(grad), normal(2, 5, 4, seed=1).requires_grad_(grad)
    mask = torch.arange(18).view(2, 9) % 4 != 0
    ops = torch.ops.fastvq
    torch.library.opcheck(ops.nearest_code, (x, codebook, "exact", False, None))
    torch.library.opcheck(ops.nearest_code_statistics, (x, codebook, None, "exact", False, False, None))
    torch.library.opcheck(ops.nearest_code_statistics, (x, codebook, mask, "fast", True, False, "torch"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool) -> None:
    def run(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        found = nearest_code_statistics(x, codebook, mask=x[:, 0] > 0)
        return nearest_code(x, codebook, metric="cosine"), *found

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (30, 41):
        x, codebook = normal(rows, 6).requires_grad_(), normal(7, 6, seed=1)
        got, want = compiled(x, codebook), run(x, codebook)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(torch.autograd.grad(got[-1], x)[0], torch.autograd.grad(want[-1], x)[0])


def test_check_finite() -> None:
    x, codebook = normal(2, 9, 4), normal(2, 5, 4)
    assert torch.equal(nearest_code(x, codebook, check_finite=True), nearest_code(x, codebook))
    x[1, 3, 2] = NAN
    message = "x: expected finite values, got NaN or infinity in 1 of 18 vectors, the first at [1, 3]"
    with refuses(ArgumentError, re.escape(message)):
        nearest_code(x, codebook, check_finite=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    with refuses(ArgumentError, "x: expected finite values"):
        nearest_code_statistics(x, codebook, mask=mask, check_finite=True)
    mask[1, 3] = False
    assert nearest_code_statistics(x, codebook, mask=mask, check_finite=True).squared_error.isfinite().all()


@pytest.mark.parametrize(
    ("x", "codebook", "error", "message"),
    [
        ([[1.0]], torch.zeros(3, 1), ArgumentTypeError, "x: expected a torch.Tensor, got list"),
        (torch.zeros(4), torch.zeros(3, 4), ArgumentError, "x: expected shape [N, D] or [H, N, D], got [4]"),
        (torch.zeros(2, 4), torch.zeros(3, 5), ArgumentError, "codebook: expected shape [K, 4], got [3, 5]"),
        (torch.zeros(2, 4), torch.zeros(4), ArgumentError, "codebook: expected shape [K, 4], got [4]"),
        (torch.zeros(2, 2, 4), torch.zeros(3, 4), ArgumentError, "codebook: expected shape [2, K, 4], got [3, 4]"),
        (torch.zeros(2, 2, 4), torch.zeros(3, 3, 4), ArgumentError, "codebook: expected shape [2, K, 4]"),
        (torch.zeros(2, 4), torch.zeros(0, 4), ArgumentError, "codebook: expected at least one code"),
        (torch.zeros(2, 4).long(), torch.zeros(3, 4), ArgumentTypeError, "x: expected a floating-point tensor"),
        (torch.zeros(2, 4), torch.zeros(3, 4).int(), ArgumentTypeError, "codebook: expected a floating-point tensor"),
        (torch.zeros(2, 4), torch.zeros(3, 4, device="meta"), ArgumentError, "codebook: expected device cpu"),
    ],
    ids=["list", "1d", "width", "codebook-1d", "no-heads", "heads", "empty", "int-x", "int-codebook", "device"],
)
def test_refuses(x: Any, codebook: Tensor, error: type[Exception], message: str) -> None:
    for operation in (nearest_code, nearest_code_statistics):
        with refuses(error, re.escape(message)):
            operation(x, codebook)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "dot"}, ArgumentError, "metric: expected one of 'euclidean', 'cosine', got 'dot'"),
        ({"mode": "quick"}, ArgumentError, "mode: expected one of 'exact', 'fast', got 'quick'"),
        ({"backend": "cuda"}, ArgumentError, "backend: expected None or one of"),
        ({"backend": "triton"}, UnavailableError, "backend: 'triton' was asked for but cannot run nearest_code here"),
        ({"mask": [True]}, ArgumentTypeError, "mask: expected a torch.Tensor, got list"),
        ({"mask": torch.ones(2)}, ArgumentTypeError, "mask: expected torch.bool, got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ArgumentError, "mask: expected shape [2], got [3]"),
    ],
    ids=["metric", "mode", "backend", "triton", "mask-list", "mask-dtype", "mask-shape"],
)
def test_refuses_options(
    options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refuses(error, re.escape(message)):
        nearest_code_statistics(torch.zeros(2, 4), torch.zeros(3, 4), **options)


def test_explains_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = normal(4, 3), normal(5, 3)
    if _engine.available():
        assert explain_backend("nearest_code", x, codebook).splitlines()[0].startswith("cpp: chosen")
    monkeypatch.setattr(_engine, "why_unavailable", lambda: "there is none")
    assert explain_backend("nearest_code", x, codebook).splitlines()[:2] == [
        "cpp: there is none",
        "torch: chosen: the first that can run",
    ]
    with refuses(UnavailableError, "backend: 'cpp' was asked for but cannot run nearest_code here: there is none"):
        nearest_code(x, codebook, backend="cpp")
