"""The Triton kernels of nearest code, against float64 in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_helpers import (
    Check,
    checked_in_both,
    serve,
)

UNIT = 2.0**-24
NAN, INF = math.nan, math.inf
MODES = ("exact", "fast")

Data = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def search(x: Tensor, codebook: Tensor, mode: str = "exact") -> Tensor:
    from fastvq.kernels import nearest_code as kernels

    return kernels.nearest_code(x, codebook, mode=mode)


def statistics(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, mode: str = "exact", deterministic: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastvq.kernels import nearest_code as kernels

    return kernels.nearest_code_statistics(x, codebook, mask, mode=mode, deterministic=deterministic)


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances [H, N, K] in float64."""
    x, codebook = x.double().cpu(), codebook.double().cpu()
    return torch.stack([(codes - part[:, None]).square().sum(-1) for part, codes in zip(x, codebook, strict=True)])


def tolerance(x: Tensor, codebook: Tensor, *competing: Tensor) -> Tensor:
    """16 u (|x| + |c|)^2 of every vector, [H, N], c the longer of the competing codes; beyond D = 256 it grows with
    sqrt(D)."""
    lengths = codebook.double().cpu().norm(dim=-1)
    longer = torch.stack([lengths.gather(1, codes.cpu()) for codes in competing]).amax(0)
    reach = x.double().cpu().norm(dim=-1) + longer
    return 16 * max(1, x.shape[-1] / 256) ** 0.5 * UNIT * reach.square()


def assert_exact(x: Tensor, codebook: Tensor, found: Tensor, *, near_ties: float = 1.0) -> str:
    """The criterion of exact mode; ``near_ties`` bounds the share of vectors whose index it leaves open."""
    assert found.dtype == torch.int64
    assert found.shape == x.shape[:2]
    found = found.cpu()
    gaps = distances(x, codebook)
    assert (found >= 0).all()
    assert (found < codebook.shape[1]).all()
    two = gaps.topk(min(2, gaps.shape[2]), dim=2, largest=False)
    first, second = two.indices[..., 0], two.indices[..., -1]
    allowed = tolerance(x, codebook, found, first)
    excess = gaps.gather(2, found[..., None]).squeeze(2) - two.values[..., 0]
    assert (excess <= allowed).all(), f"excess up to {(excess / allowed).max():.3g} of what is allowed"
    open_rows = two.values[..., -1] - two.values[..., 0] <= tolerance(x, codebook, first, second)
    open_rows &= gaps.shape[2] > 1
    assert torch.equal(found[~open_rows], first[~open_rows])
    # Among bitwise equal codes the first.
    for head, codes in enumerate(codebook.cpu()):
        same = (codes[:, None] == codes[None]).all(2)
        assert torch.equal(same.int().argmax(1)[found[head]], found[head])
    assert open_rows.double().mean() <= near_ties
    return f"{int(open_rows.sum())} of {open_rows.numel()} vectors excluded as near ties"


def assert_fast(x: Tensor, codebook: Tensor, found: Tensor) -> None:
    """The bound that `fastvq.kernels.nearest_code.nearest_code` states for fast mode."""
    gaps, found = distances(x, codebook), found.cpu()
    excess = gaps.gather(2, found[..., None]).squeeze(2) - gaps.amin(2)
    allowed = tolerance(x, codebook, found, gaps.argmin(2))
    for head, (vectors, codes) in enumerate(zip(x.double().cpu(), codebook.double().cpu(), strict=True)):
        exponents = codes.norm(dim=1).log2().floor()
        centre = codes[exponents <= exponents.sort().values[:2].amax() + 1].mean(0)
        lengths, code_lengths = (vectors - centre).norm(dim=1), (codes - centre).norm(dim=1)
        within = code_lengths < 16 * max(lengths.quantile(0.95), code_lengths.amin())
        largest = code_lengths[within].amax()
        allowed[head] += 2.0**-7 * lengths * largest + 2.0**-14 * largest**2
    assert (excess <= allowed).all()


def assert_statistics(x: Tensor, codebook: Tensor, mask: Tensor | None, got: tuple[Tensor, ...]) -> None:
    """Against float64, at most twice as wrong as float32 operators of PyTorch, for the indices that were found."""
    error, sums, counts, indices = (value.cpu() for value in got)
    assert (error.dtype, sums.dtype, counts.dtype) == (torch.float32, torch.float32, torch.int64)
    x, codebook = x.cpu(), codebook.cpu()
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
    for head in range(x.shape[0]):
        rows, index, codes = x[head][keep[head]], indices[head][keep[head]], codebook[head]
        assert torch.equal(counts[head], torch.bincount(index, minlength=codes.shape[0]))
        exact = torch.zeros(codes.shape, dtype=torch.float64).index_add_(0, index, rows.double())
        plain = torch.zeros(codes.shape).index_add_(0, index, rows.float())
        assert_no_worse(sums[head], plain, exact)
        exact = (rows.double() - codes.double()[index]).square().sum()
        # Three roundings of each square, and a tree of additions whose blocks of columns form a chain.
        roundings = 3 + math.log2(max(2, rows.numel())) + rows.shape[1] / 64
        assert (error[head].double() - exact).abs() <= roundings * UNIT * exact


def assert_no_worse(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    worst = (plain.double() - exact).abs().max()
    assert (got.double() - exact).abs().max() <= 2 * worst + UNIT * exact.abs().max()


def random_data(n: int, k: int, d: int, *, heads: int = 1, dtype: torch.dtype = torch.float32) -> Data:
    return normal(heads, n, d).to(dtype), normal(heads, k, d, seed=1).to(dtype)


def clustered() -> Data:
    """Vectors close to codes, as in a trained model."""
    codes = normal(1, 90, 48, seed=1)
    return codes[:, torch.arange(200) % 90] + 0.2 * normal(1, 200, 48), codes


def fresh() -> Data:
    """A codebook as it is initialised, far smaller than the vectors."""
    return normal(1, 150, 32), (torch.rand(1, 300, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1) / 300


def offset() -> Data:
    """Far from the origin: the distance of two codes is small against their norm."""
    x, codes = random_data(150, 70, 24)
    return x + 30, codes + 30


def near_ties() -> Data:
    """Pairs of codes that differ by less than float16 resolves, and more than the tolerance."""
    codes = normal(1, 60, 64, seed=1)
    twins = codes + 2e-4 * normal(1, 60, 64, seed=2)
    return normal(1, 150, 64), torch.stack([codes, twins], dim=2).flatten(1, 2)


def graded_ties() -> Data:
    """Vectors midway between two codes, off the middle by amounts from far below to far above every bound."""
    codes = normal(1, 40, 40, seed=1)
    a, b = codes[:, torch.arange(120) % 40], codes[:, (torch.arange(120) * 7 + 1) % 40]
    share = 0.5 + torch.logspace(-9, -1, 120)[None, :, None] * torch.tensor([1.0, -1.0]).repeat(60)[None, :, None]
    return share * a + (1 - share) * b, codes


def duplicates() -> Data:
    """Every code several times, among different tiles too."""
    return normal(1, 100, 16), normal(1, 30, 16, seed=1)[:, torch.randperm(300, generator=torch.Generator()) % 30]


def one_code() -> Data:
    return normal(1, 70, 20), normal(1, 1, 20, seed=1).expand(1, 140, 20)


def dominated() -> Data:
    """One code takes everything; sums cancel and squares do not."""
    codes = 100 + normal(1, 70, 20, seed=1)
    codes[:, 41] = 0
    return normal(1, 500, 20), codes


def far(every: int, factor: float, *, offset: float = 0.0) -> Data:
    """Some codes so far away that float16 would round all others to nothing beside them."""
    x, codes = random_data(130, 70, 24)
    x, codes = x + offset, codes + offset
    codes[0, 3::every] *= factor
    return x, codes


def most_far() -> Data:
    x, codes = far(1, 1e5)
    return x, codes[:, torch.randperm(70, generator=torch.Generator().manual_seed(2))]


def far_vectors() -> Data:
    """A few vectors near the codes far away, and some between those and the others."""
    x, codes = far(9, 1e6)
    x[0, 5::50] = codes[0, [3, 12, 66]] * 1.01
    x[0, 7] = codes[0, 3] * 0.5 + 1
    x[0, 8] = codes[0, 21] * 1e-3
    return x, codes


def outliers() -> Data:
    """More codes than decide centre and scale, far from the origin, with a few of other lengths among them."""
    x, codes = random_data(300, 700, 24)
    codes[0, 10::97] *= 2.5
    codes[0, 333] *= 1e6
    codes[0, 334] *= 40
    x, codes = x + 10, codes + 10
    codes[0, 500] = 0
    return x, codes


def heavy_tailed() -> Data:
    x, codes = random_data(150, 100, 24)
    return x * (2 * normal(1, 150, 1, seed=2)).exp(), codes * (2 * normal(1, 100, 1, seed=3)).exp()


def two_sizes() -> Data:
    """Codes and vectors small and large, half of each."""
    x, codes = random_data(60, 40, 24)
    return torch.cat([x, 1e4 * x], dim=1), torch.cat([1e4 * codes, codes], dim=1)


def scaled(x_scale: float, code_scale: float) -> Data:
    x, codes = random_data(100, 70, 24)
    return x * x_scale, codes * code_scale


DATA: dict[str, Callable[[], Data]] = {
    "ragged": lambda: random_data(131, 70, 24),
    "single-vector": lambda: random_data(1, 37, 24),
    "single-code": lambda: random_data(20, 1, 8),
    "width-1": lambda: random_data(150, 20, 1),
    "width-130": lambda: random_data(65, 200, 130),
    "width-300": lambda: random_data(30, 150, 300),
    "width-512": lambda: random_data(70, 65, 512),
    "many-codes": lambda: random_data(10, 1100, 20),
    "bfloat16": lambda: random_data(140, 70, 24, dtype=torch.bfloat16),
    "float16": lambda: random_data(140, 70, 24, dtype=torch.float16),
    "bfloat16-codes": lambda: (normal(1, 140, 24), normal(1, 70, 24, seed=1).bfloat16()),
    "clustered": clustered,
    "fresh": fresh,
    "offset": offset,
    "near-ties": near_ties,
    "graded-ties": graded_ties,
    "duplicates": duplicates,
    "one-code": one_code,
    "dominated": dominated,
    "one-far": lambda: far(70, 1e6),
    "half-far": lambda: far(2, 1e3),
    "most-far": most_far,
    "offset-but-one-far": lambda: far(70, -1e5, offset=10.0),
    "offset-but-zeros": lambda: far(40, 0.0, offset=10.0),
    "far-vectors": far_vectors,
    "outliers": outliers,
    "heavy-tailed": heavy_tailed,
    "two-sizes": two_sizes,
    "a-code-across-the-range": lambda: (1e-12 * far(70, 1e29)[0], 1e-12 * far(70, 1e29)[1]),
    "shortest": lambda: scaled(0.2e-18, 0.2e-18),
    "longest": lambda: scaled(0.2e18, 0.2e18),
    "tiny-vectors": lambda: scaled(1e-12, 1.0),
    "tiny-codes": lambda: scaled(1.0, 1e-12),
}
# Data where the index must be settled for nearly every vector.
RANDOM = ("ragged", "width-130", "width-300", "width-512", "many-codes", "fresh", "bfloat16-codes")


def check_data(name: str) -> Check:
    def check(device: str) -> str:
        x, codes = (value.to(device) for value in DATA[name]())
        said = assert_exact(x, codes, search(x, codes), near_ties=0.01 if name in RANDOM else 1.0)
        fast = search(x, codes, "fast")
        assert_fast(x, codes, fast)
        if name == "one-code":
            assert fast.count_nonzero() == 0
        return said

    return check


def undecided(x: Tensor, codes: Tensor, mode: str = "exact") -> tuple[float, float]:
    """Shares of the vectors that have a pair of codes compared, and that take a second pass."""
    from fastvq.kernels import nearest_code as kernels

    numbers = torch.zeros(2, dtype=torch.int32, device=x.device)
    kernels.nearest_code(x, codes, mode=mode, undecided=numbers)
    pairs, crowded = (numbers / x.shape[:2].numel()).tolist()
    return pairs, crowded


def check_far_codes_leave_no_more_undecided(device: str) -> str:
    """What is scored again is what a far code costs."""
    said = []
    for offset in (0.0, 10.0):
        x, codes = (value.to(device) for value in far(70, 1.0, offset=offset))
        shares = {"none": undecided(x, codes)}
        assert undecided(x, codes, "fast") == (0, 0)
        for name, every, factor in (("one", 70, 1e6), ("one-near", 70, 50.0), ("half", 2, 1e6), ("most", 1, 1e5)):
            x, codes = (value.to(device) for value in far(every, factor, offset=offset))
            shares[name] = undecided(x, codes)
            assert sum(shares[name]) <= sum(shares["none"]) + 0.02
            assert undecided(x, codes, "fast") == (0, 0)
        said.append(f"offset {offset}: {shares}")
    x, codes = (value.to(device) for value in far_vectors())
    assert 0 < undecided(x, codes, "fast")[1] < 0.1
    return "; ".join(said)


def check_few_are_undecided(device: str) -> str:
    """On random vectors a second pass is rare, with all codes in the sample that decides the scale, and with some."""
    said = []
    # Among the codes within reach one is ten times as long as the others, and the bound is proportional to it.
    for data, most in ((random_data(300, 500, 24), 0.04), (random_data(300, 600, 24), 0.04), (outliers(), 0.2)):
        pairs, crowded = undecided(*(value.to(device) for value in data))
        assert pairs < most
        assert crowded < most / 2
        said.append(f"{pairs:.2%} and {crowded:.2%}")
    return ", ".join(said)


def check_many_blocks_of_codes(device: str) -> None:
    """Equal codes in blocks far apart."""
    x, codes = (value.to(device) for value in random_data(40, 1100, 20))
    twice = codes[:, torch.arange(1100) % 400]
    x = torch.cat([x, twice[:, 5:900:30]], 1)
    for table in (codes, twice):
        assert_exact(x, table, search(x, table))
        assert_fast(x, table, search(x, table, "fast"))


def check_far_codes_of_one_head(device: str) -> None:
    x, codes = (value.to(device) for value in random_data(60, 40, 24, heads=3))
    plain = search(x, codes)
    codes[1, 20], codes[1, 3] = 1e6, -1e7
    x[1, 9] = 1.1e6
    for mode in MODES:
        found = search(x, codes, mode)
        assert found[1, 9] == 20
        if mode == "exact":
            assert_exact(x, codes, found)
            assert torch.equal(found[[0, 2]], plain[[0, 2]])


def check_fast_is_wrong_where_exact_is_not(device: str) -> str:
    """Otherwise the data would not show that exact mode scores again."""
    x, codes = (value.to(device) for value in near_ties())
    gaps = distances(x, codes)
    two = gaps.topk(2, dim=2, largest=False)
    settled = two.values[..., 1] - two.values[..., 0] > tolerance(x, codes, *two.indices.unbind(2))
    assert settled.double().mean() > 0.5
    wrong = {mode: ((search(x, codes, mode).cpu() != gaps.argmin(2)) & settled).sum() for mode in MODES}
    assert wrong["exact"] == 0
    assert wrong["fast"] > 0
    return f"fast chose another code for {int(wrong['fast'])} of {int(settled.sum())} vectors"


def check_strided_heads(device: str) -> None:
    """Heads that lie side by side in each vector, codes among other columns, and a last axis that is not contiguous."""
    x = normal(131, 2, 24).to(device).movedim(1, 0)
    codes = normal(70, 2, 40, seed=1).to(device).movedim(1, 0)[..., 3:27]
    assert (x.stride(), codes.stride()) == ((24, 48, 1), (40, 80, 1))
    mask = torch.arange(262, device=device).view(131, 2).T % 3 > 0
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for deterministic in (False, True):
        got = statistics(x, codes, mask, deterministic=deterministic)
        assert_statistics(x, codes, mask, got)
        assert_exact(x, codes, got[3])
        assert torch.equal(got[3], search(turned, codes))


def check_empty(device: str) -> None:
    for heads, n in ((1, 0), (0, 5), (2, 0)):
        x, codes = torch.empty(heads, n, 8, device=device), torch.ones(heads, 3, 8, device=device)
        assert search(x, codes).shape == (heads, n)
        for deterministic in (False, True):
            error, sums, counts, indices = statistics(x, codes, deterministic=deterministic)
            assert error.tolist() == [0] * heads
            assert indices.shape == (heads, n)
            assert (sums.shape, counts.shape) == ((heads, 3, 8), (heads, 3))
            assert (sums.abs().sum(), counts.sum()) == (0, 0)


def check_not_finite(device: str) -> None:
    x, codes = (value.to(device) for value in random_data(140, 70, 24))
    codes[0, 5, 3], codes[0, 69, 0], codes[0, 0, 7] = NAN, INF, -INF
    good = torch.tensor([k for k in range(70) if k not in (0, 5, 69)], device=device)
    x[0, 7, 0], x[0, 130, 23], x[0, 64, 5], x[0, 8] = NAN, INF, -INF, 1e30
    rows = torch.tensor([n for n in range(140) if n not in (7, 8, 64, 130)], device=device)
    clean = x[:, rows]
    for mode in MODES:
        for deterministic in (False, True):
            error, sums, counts, indices = statistics(x, codes, mode=mode, deterministic=deterministic)
            assert indices[0, [7, 64, 130]].tolist() == [0, 0, 0]
            assert indices[0, 8] in good
            assert counts.sum() == 137
            assert counts[0, [0, 5, 69]].tolist() == [0, 0, 0]
            assert sums.isfinite().all()
            assert not error.isfinite().any()
            found = indices[:, rows]
            nearest = good[distances(clean, codes[:, good]).argmin(2).to(device)]
            assert mode == "fast" or torch.equal(found, nearest)
            mask = torch.zeros(1, 140, dtype=torch.bool, device=device)
            mask[:, rows] = True
            error, sums, counts, indices = statistics(x, codes, mask, mode=mode, deterministic=deterministic)
            usable = torch.where(codes.isfinite(), codes, 0.0)
            assert_statistics(clean, usable, None, (error, sums, counts, indices[:, rows]))


def check_no_usable_code(device: str) -> None:
    x, codes = normal(1, 30, 8).to(device), torch.full((1, 20, 8), NAN, device=device)
    for deterministic in (False, True):
        error, sums, counts, indices = statistics(x, codes, deterministic=deterministic)
        assert indices.count_nonzero() == 0
        assert counts.sum() == 0
        assert sums.count_nonzero() == 0
        assert error.isnan().all()


def check_statistics(name: str) -> Check:
    def check(device: str) -> None:
        x, codes = (value.to(device) for value in DATA[name]())
        some = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)).to(device) < 0.7
        found = search(x, codes, "fast")
        for mask, deterministic in ((None, False), (some, False), (some, True)):
            got = statistics(x, codes, mask, mode="fast", deterministic=deterministic)
            assert_statistics(x, codes, mask, got)
            assert torch.equal(got[3], found)

    return check


def check_deterministic(device: str) -> None:
    x, codes = (value.to(device) for value in clustered())
    first = statistics(x, codes, deterministic=True)
    again = statistics(x, codes, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def check_everything_masked(device: str) -> None:
    x, codes = (value.to(device) for value in random_data(40, 20, 8))
    x[0, 3] = NAN
    mask = torch.zeros(1, 40, dtype=torch.bool, device=device)
    for deterministic in (False, True):
        error, sums, counts, indices = statistics(x, codes, mask, deterministic=deterministic)
        assert (error.item(), counts.sum(), sums.abs().sum()) == (0, 0, 0)
        assert torch.equal(indices, search(x, codes))


def check_exact_statistics(device: str) -> None:
    x, codes = (value.to(device) for value in near_ties())
    got = statistics(x, codes)
    assert_exact(x, codes, got[3])
    assert_statistics(x, codes, None, got)


def check_launches(device: str) -> str:
    """Search, statistics and move of a codebook are five launches; PyTorch does no more than allocate."""
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    from fastvq.kernels import nearest_code as kernels
    from fastvq.ops.ema_update.backends import BACKENDS as UPDATE
    from fastvq.ops.ema_update.options import Options
    from fastvq.ops.nearest_code.backends import BACKENDS as SEARCH
    from fastvq.ops.nearest_code.options import StatisticsOptions

    seen: list[str] = []
    kind: Any = type(kernels._search_kernel)
    launch = kind.run

    def run(kernel: Any, *given: Any, **options: Any) -> Any:
        seen.append(kernel.fn.__name__)
        with _disable_current_modes():
            return launch(kernel, *given, **options)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            views = all(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
            if not views and "empty" not in func.__name__:
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, codes = (value.to(device) for value in random_data(70, 40, 20))
    cluster_size, embedding_sum = torch.ones(1, 40, device=device), codes.clone()
    said = {}
    for deterministic in (False, True):
        seen.clear()
        kind.run = run
        try:
            with Watching():
                search = SEARCH.select("triton", x, codes).run.statistics
                _, sums, counts, _ = search(x, codes, None, StatisticsOptions("exact", deterministic, False, "triton"))
                given = counts, sums, cluster_size, embedding_sum, codes
                UPDATE.select("triton", *given).run(*given, Options(0.99, 1e-5, True, "triton"))
        finally:
            kind.run = launch
        said[deterministic] = list(seen)
    assert said[False] == [
        "_prepare_kernel",
        "_search_kernel",
        "_crowded_kernel",
        "_statistics_kernel",
        "_update_kernel",
    ]
    assert len(said[True]) <= 10
    return f"deterministic: {said[True]}"


def check_public_operation(device: str) -> None:
    """Dispatch, the cosine and gradients, against the plain backend."""
    from fastvq.ops import nearest_code, nearest_code_statistics

    x, codes = (value[0].to(device) for value in random_data(140, 70, 24))
    for metric in ("euclidean", "cosine"):
        plain = nearest_code(x, codes, metric=metric, backend="torch")
        assert torch.equal(nearest_code(x, codes, metric=metric, backend="triton"), plain)
    grads = []
    for backend in ("torch", "triton"):
        leaves = x.clone().requires_grad_(), codes.clone().requires_grad_()
        nearest_code_statistics(*leaves, backend=backend).squared_error.backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_wide_vectors_are_refused(device: str) -> None:
    from fastvq.errors import UnavailableError

    x, codes = (value.to(device) for value in random_data(3, 4, 513))
    with pytest.raises(UnavailableError, match="^x: expected vectors of at most 512 numbers for Triton, got 513"):
        search(x, codes)


GROUPS: dict[str, dict[str, Check]] = {
    "search": {
        **{name: check_data(name) for name in DATA},
        "fast-is-wrong-where-exact-is-not": check_fast_is_wrong_where_exact_is_not,
        "far-codes-leave-no-more-undecided": check_far_codes_leave_no_more_undecided,
        "few-are-undecided": check_few_are_undecided,
        "many-blocks-of-codes": check_many_blocks_of_codes,
        "far-codes-of-one-head": check_far_codes_of_one_head,
        "wide-vectors-are-refused": check_wide_vectors_are_refused,
    },
    "statistics": {
        **{name: check_statistics(name) for name in ("ragged", "float16", "bfloat16-codes", "width-130", "dominated")},
        "strided-heads": check_strided_heads,
        "empty": check_empty,
        "not-finite": check_not_finite,
        "no-usable-code": check_no_usable_code,
        "deterministic": check_deterministic,
        "everything-masked": check_everything_masked,
        "exact": check_exact_statistics,
        "launches": check_launches,
        "public-operation": check_public_operation,
    },
}


test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


if __name__ == "__main__":
    serve(GROUPS)
