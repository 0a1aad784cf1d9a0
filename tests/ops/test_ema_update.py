"""The update of a codebook's averages, against the formula in float64."""

from __future__ import annotations

import os

import ema_checks as checks
import pytest
import torch
from ema_checks import State, case, copies, errors, expected, same
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
EACH_SHAPE = pytest.mark.parametrize("shape", checks.SHAPES, ids=lambda s: "x".join(map(str, s)))


@EACH_BACKEND
@EACH_SHAPE
@pytest.mark.parametrize("decay", checks.DECAYS)
def test_matches_float64(backend: str, shape: tuple[int, ...], decay: float) -> None:
    checks.check_float64(backend, shape, decay)


@EACH_BACKEND
def test_arguments_are_left_alone(backend: str) -> None:
    checks.check_arguments_left_alone(backend)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.float64], ids=str)
def test_counts_of_other_types(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpp" and dtype == torch.float64:
        with pytest.raises(UnavailableError, match="counts"):
            checks.check_counts_of_type(backend, dtype)
        return
    checks.check_counts_of_type(backend, dtype)


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
    checks.check_strided_sums("cpp")


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
    checks.check_no_counts_at_all(backend)


@EACH_BACKEND
@pytest.mark.parametrize("bad", ["empty", "nan", "inf"])
def test_unusable_statistics_can_be_skipped_by_codebook(backend: str, bad: str) -> None:
    checks.check_unusable(backend, bad)


@EACH_BACKEND
def test_tells_autograd_that_buffers_have_changed(backend: str) -> None:
    checks.check_autograd_is_told(backend)


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
    assert lines[:2] == ["cpp: it takes float32, not torch.float64", "torch: chosen: the first that can run"]
    assert lines[2].startswith("triton: it needs a GPU" if "TRITON_INTERPRET" not in os.environ else "triton: ")
    with pytest.raises(UnavailableError, match="float32"):
        ema_update(counts, sums, **state, decay=0.9, backend="cpp")
    with pytest.raises(ArgumentError, match="'cpp', 'torch', 'triton' for ema_update"):
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
