"""The update of a codebook's averages, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq import _engine
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops import ema_update, ema_update_reference, explain_backend, nearest_code_statistics
from fastvq.ops.ema_update.cpp import cpp_ema_update
from fastvq.ops.ema_update.options import Options

BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(not _engine.available(), reason="needs the extension")),
    "torch",
]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EACH_SHAPE = pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (61, 9), (67, 33), (3, 13, 5)], ids=lambda s: "x".join(map(str, s))
)
State = dict[str, Tensor]


def case(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, State]:
    """Counts with zeros among them, sums, and buffers; the codes are poison."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 40, shape[:-1], generator=generator)
    counts[..., ::3] = 0
    counts[..., -1] = 7
    sums = torch.randn(shape, generator=generator).to(dtype) * counts[..., None]
    state = {
        "cluster_size": torch.rand(shape[:-1], generator=generator).to(dtype) * 9,
        "embedding_sum": torch.randn(shape, generator=generator).to(dtype),
        "embedding": torch.full(shape, torch.nan, dtype=dtype),
    }
    return counts, sums, state


def expected(counts: Tensor, sums: Tensor, state: State, decay: float, eps: float) -> State:
    size = decay * state["cluster_size"].double() + (1 - decay) * counts.double()
    total = decay * state["embedding_sum"].double() + (1 - decay) * sums.double()
    whole = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (whole + size.shape[-1] * eps) * whole
    return {"cluster_size": size, "embedding_sum": total, "embedding": total / smoothed[..., None]}


def copies(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[name].nan_to_num(-7), right[name].nan_to_num(-7)) for name in left)


def errors(state: State, wanted: State, sums: Tensor, before: State, decay: float) -> list[float]:
    """Worst errors in units of 2^-24, relative to what was added up."""
    scale = decay * before["embedding_sum"].double().abs() + (1 - decay) * sums.double().abs()
    ratio = (wanted["embedding"] / wanted["embedding_sum"]).abs().nan_to_num(0)
    scales = {"cluster_size": wanted["cluster_size"], "embedding_sum": scale, "embedding": scale * ratio}
    found = {name: (state[name].double() - wanted[name]).abs() for name in state}
    return [float((found[n] / scales[n].clamp(min=1e-30)).max()) * 2**24 for n in state]


@EACH_BACKEND
@EACH_SHAPE
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_matches_float64(backend: str, shape: tuple[int, ...], decay: float) -> None:
    counts, sums, state = case(*shape)
    before, addresses = copies(state), {name: value.data_ptr() for name, value in state.items()}
    assert ema_update(counts, sums, **state, decay=decay, eps=1e-3, backend=backend) is None
    assert {name: value.data_ptr() for name, value in state.items()} == addresses
    wanted = expected(counts, sums, before, decay, 1e-3)
    assert max(errors(state, wanted, sums, before, decay)) < 8


@EACH_BACKEND
def test_arguments_are_left_alone(backend: str) -> None:
    counts, sums, state = case(13, 5)
    kept = counts.clone(), sums.clone()
    ema_update(counts, sums, **state, decay=0.9, backend=backend)
    assert torch.equal(counts, kept[0])
    assert torch.equal(sums, kept[1])


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.float64], ids=str)
def test_counts_of_other_types(backend: str, dtype: torch.dtype) -> None:
    counts, sums, state = case(13, 5)
    other = copies(state)
    ema_update(counts, sums, **state, decay=0.9, backend=backend)
    if backend == "cpp" and dtype == torch.float64:
        with pytest.raises(UnavailableError, match="counts"):
            ema_update(counts.to(dtype), sums, **other, decay=0.9, backend=backend)
        return
    ema_update(counts.to(dtype), sums, **other, decay=0.9, backend=backend)
    # In float64 intermediate results are rounded once less.
    for name in state:
        torch.testing.assert_close(other[name], state[name], rtol=1e-6 if dtype == torch.float64 else 0, atol=0)


def test_float64_stays_float64() -> None:
    counts, sums, state = case(13, 5, dtype=torch.float64)
    wanted = expected(counts, sums, state, 0.7, 1e-5)
    ema_update(counts, sums, **state, decay=0.7)
    for name in state:
        torch.testing.assert_close(state[name], wanted[name], rtol=1e-14, atol=0)


def test_non_contiguous_buffers_and_sums() -> None:
    counts, sums, state = case(13, 5)
    strided = {name: torch.stack([value, value + 1], -1)[..., 0] for name, value in state.items()}
    ema_update(counts, sums, **state, decay=0.9, backend="torch")
    ema_update(counts.repeat_interleave(2)[::2], sums.T.contiguous().T, **strided, decay=0.9)
    assert same(strided, state)


@pytest.mark.skipif(not _engine.available(), reason="needs the extension")
def test_sums_need_not_be_contiguous_for_the_kernel() -> None:
    counts, sums, state = case(13, 5)
    other = copies(state)
    ema_update(counts, sums, **state, decay=0.9, backend="cpp")
    ema_update(counts.repeat_interleave(2)[::2], sums.T.contiguous().T, **other, decay=0.9, backend="cpp")
    assert same(other, state)


@pytest.mark.skipif(not _engine.available(), reason="needs the extension")
def test_threads_do_not_change_a_bit() -> None:
    counts, sums, state = case(4001, 131)
    results = []
    for threads in (1, 2, 3):
        results.append(copies(state))
        cpp_ema_update(counts, sums, *results[-1].values(), Options(0.99, 1e-5, False, None), threads=threads)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@EACH_BACKEND
def test_no_counts_at_all(backend: str) -> None:
    _, _, state = case(13, 5)
    counts, sums = torch.zeros(13, dtype=torch.int64), torch.zeros(13, 5)
    before = copies(state)
    ema_update(counts, sums, **state, decay=0.5, backend=backend)
    wanted = expected(counts, sums, before, 0.5, 1e-5)
    assert max(errors(state, wanted, sums, before, 0.5)) < 8
    state["embedding"].fill_(3)
    ema_update(counts, sums, **state, decay=0.0, backend=backend)
    assert not state["cluster_size"].any()
    assert not state["embedding_sum"].any()
    assert bool((state["embedding"] == 3).all()), "codes keep their place where nothing is left to divide by"


@EACH_BACKEND
@pytest.mark.parametrize("bad", ["empty", "nan", "inf"])
def test_unusable_statistics_can_be_skipped_by_codebook(backend: str, bad: str) -> None:
    counts, sums, state = case(3, 13, 5)
    if bad == "empty":
        counts[1] = 0
    else:
        sums[1, 4, 2] = float(bad)
    before = copies(state)
    ema_update(counts, sums, **state, decay=0.9, skip_unusable=True, backend=backend)
    assert same({n: v[1] for n, v in state.items()}, {n: v[1] for n, v in before.items()})
    for head in (0, 2):
        alone = {n: v[head].clone() for n, v in before.items()}
        ema_update(counts[head], sums[head], **alone, decay=0.9, backend=backend)
        assert same({n: v[head] for n, v in state.items()}, alone)


@EACH_BACKEND
def test_tells_autograd_that_buffers_have_changed(backend: str) -> None:
    counts, sums, state = case(13, 5)
    state["embedding"].zero_()
    x = torch.randn(2, 5, requires_grad=True)
    loss = (x @ state["embedding"].T).sum()
    ema_update(counts, sums, **state, decay=0.9, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients(grad: type) -> None:
    with grad():
        counts, sums, state = case(13, 5)
        ema_update(counts, sums, **state, decay=0.9)
        assert bool(state["embedding"].isfinite().all())


@EACH_BACKEND
def test_compiles_whole(backend: str) -> None:
    counts, sums, state = case(13, 5)
    other = copies(state)

    def update(counts: Tensor, sums: Tensor, state: State) -> Tensor:
        ema_update(counts, sums, **state, decay=0.9, backend=backend)
        return state["embedding"] * 2

    torch.compiler.reset()
    doubled = torch.compile(update, fullgraph=True, backend="aot_eager")(counts, sums, state)
    assert torch.equal(doubled, update(counts, sums, other))
    assert same(state, other)


@EACH_BACKEND
@pytest.mark.parametrize("shape", [(13, 5), (2, 13, 5)], ids=["plain", "heads"])
def test_opcheck(backend: str, shape: tuple[int, ...]) -> None:
    counts, sums, state = case(*shape)
    state["embedding"].zero_()
    arguments = (counts, sums, *state.values(), 0.9, 1e-5, True, backend)
    torch.library.opcheck(torch.ops.fastvq.ema_update.default, arguments)


def test_follows_the_statistics() -> None:
    x, codebook = torch.randn(389, 9), torch.randn(61, 9)
    found = nearest_code_statistics(x, codebook)
    state = {"cluster_size": torch.ones(61), "embedding_sum": codebook.clone(), "embedding": codebook.clone()}
    wanted = expected(found.counts, found.sums, state, 0.9, 1e-5)
    before = copies(state)
    ema_update(found.counts, found.sums, **state, decay=0.9)
    assert max(errors(state, wanted, found.sums, before, 0.9)) < 8


def test_explains_its_backends() -> None:
    counts, sums, state = case(13, 5, dtype=torch.float64)
    lines = explain_backend("ema_update", counts, sums, *state.values()).splitlines()
    assert lines == ["cpp: it takes float32, not torch.float64", "torch: chosen: the first that can run"]
    with pytest.raises(UnavailableError, match="float32"):
        ema_update(counts, sums, **state, decay=0.9, backend="cpp")
    with pytest.raises(ArgumentError, match="'cpp', 'torch' for ema_update"):
        ema_update(counts, sums, **state, decay=0.9, backend="cuda")


WRONG = {
    "counts-shape": ({"counts": torch.ones(12)}, ArgumentError, r"counts: expected shape \[13\]"),
    "counts-type": ({"counts": torch.ones(13, dtype=torch.bool)}, ArgumentTypeError, "counts"),
    "sums-shape": ({"sums": torch.ones(13, 4)}, ArgumentError, r"sums: expected shape \[13, 5\]"),
    "sums-type": ({"sums": torch.ones(13, 5, dtype=torch.int64)}, ArgumentTypeError, "sums: expected a floating"),
    "sums-device": ({"sums": torch.ones(13, 5, device="meta")}, ArgumentError, "sums: expected device cpu"),
    "size-shape": ({"cluster_size": torch.ones(1, 13)}, ArgumentError, "cluster_size: expected shape"),
    "size-type": ({"cluster_size": torch.ones(13, dtype=torch.int64)}, ArgumentTypeError, "cluster_size"),
    "total-list": ({"embedding_sum": [1.0]}, ArgumentTypeError, "embedding_sum: expected a torch.Tensor, got list"),
    "codes-shape": ({"embedding": torch.ones(13)}, ArgumentError, r"embedding: expected shape \[K, D\]"),
    "codes-gradient": ({"embedding": torch.ones(13, 5, requires_grad=True)}, ArgumentError, "without gradient"),
    "decay-above": ({"decay": 1.01}, ArgumentError, r"decay: must lie in \[0, 1\], got 1.01"),
    "decay-below": ({"decay": -0.1}, ArgumentError, "decay"),
    "decay-nan": ({"decay": float("nan")}, ArgumentError, "decay"),
    "decay-type": ({"decay": "0.9"}, ArgumentTypeError, "decay: expected a number, got str '0.9'"),
    "eps-zero": ({"eps": 0}, ArgumentError, "eps: expected a positive number, got 0"),
    "eps-nan": ({"eps": float("nan")}, ArgumentError, "eps"),
    "skip-type": ({"skip_unusable": 1}, ArgumentTypeError, "skip_unusable: expected a bool, got int 1"),
}


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_refuses_before_any_work(change: dict[str, object], kind: type[Exception], message: str) -> None:
    counts, sums, state = case(13, 5)
    before = copies(state)
    arguments = {"counts": counts, "sums": sums, **state, "decay": 0.9, **change}
    with pytest.raises(kind, match=message):
        ema_update(**arguments)  # type: ignore[arg-type]
    assert same(state, before)


def test_refuses_one_tensor_for_two_buffers() -> None:
    counts, sums, state = case(13, 5)
    state["embedding_sum"] = state["embedding"]
    with pytest.raises(ArgumentError, match="embedding_sum: expected another tensor"):
        ema_update(counts, sums, **state, decay=0.9)


def test_reference_has_the_same_arguments() -> None:
    counts, sums, state = case(13, 5)
    other = copies(state)
    ema_update_reference(counts, sums, **other, decay=0.9, eps=1e-5, skip_unusable=False)
    ema_update(counts, sums, **state, decay=0.9, backend="torch")
    assert same(state, other)
