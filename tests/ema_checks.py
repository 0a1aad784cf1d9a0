"""What every backend of the update of a codebook's averages must do, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq.ops import ema_update

SHAPES = [(1, 1), (5, 7), (61, 9), (67, 33), (3, 13, 5)]
DECAYS = [0.0, 0.3, 0.99, 1.0]
State = dict[str, Tensor]


def case(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, State]:
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
    return counts.to(device), sums.to(device), {name: value.to(device) for name, value in state.items()}


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


def check_float64(backend: str, shape: tuple[int, ...], decay: float, device: str = "cpu") -> None:
    counts, sums, state = case(*shape, device=device)
    before, addresses = copies(state), {name: value.data_ptr() for name, value in state.items()}
    assert ema_update(counts, sums, **state, decay=decay, eps=1e-3, backend=backend) is None
    assert {name: value.data_ptr() for name, value in state.items()} == addresses
    wanted = expected(counts, sums, before, decay, 1e-3)
    assert max(errors(state, wanted, sums, before, decay)) < 8


def check_arguments_left_alone(backend: str, device: str = "cpu") -> None:
    counts, sums, state = case(13, 5, device=device)
    kept = counts.clone(), sums.clone()
    ema_update(counts, sums, **state, decay=0.9, backend=backend)
    assert torch.equal(counts, kept[0])
    assert torch.equal(sums, kept[1])


def check_counts_of_type(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """The same bits as counts in int64."""
    counts, sums, state = case(13, 5, device=device)
    other = copies(state)
    ema_update(counts, sums, **state, decay=0.9, backend=backend)
    ema_update(counts.to(dtype), sums, **other, decay=0.9, backend=backend)
    # In float64 intermediate results are rounded once less.
    for name in state:
        torch.testing.assert_close(other[name], state[name], rtol=1e-6 if dtype == torch.float64 else 0, atol=0)


def check_strided_sums(backend: str, device: str = "cpu") -> None:
    counts, sums, state = case(13, 5, device=device)
    other = copies(state)
    ema_update(counts, sums, **state, decay=0.9, backend=backend)
    ema_update(counts.repeat_interleave(2)[::2], sums.T.contiguous().T, **other, decay=0.9, backend=backend)
    assert same(other, state)


def check_no_counts_at_all(backend: str, device: str = "cpu") -> None:
    _, _, state = case(13, 5, device=device)
    counts, sums = torch.zeros(13, dtype=torch.int64, device=device), torch.zeros(13, 5, device=device)
    before = copies(state)
    ema_update(counts, sums, **state, decay=0.5, backend=backend)
    wanted = expected(counts, sums, before, 0.5, 1e-5)
    assert max(errors(state, wanted, sums, before, 0.5)) < 8
    state["embedding"].fill_(3)
    ema_update(counts, sums, **state, decay=0.0, backend=backend)
    assert not state["cluster_size"].any()
    assert not state["embedding_sum"].any()
    assert bool((state["embedding"] == 3).all()), "codes keep their place where nothing is left to divide by"


def check_unusable(backend: str, bad: str, shape: tuple[int, int, int] = (3, 13, 5), device: str = "cpu") -> None:
    """A codebook with ``bad`` statistics is skipped, the others move as they would alone."""
    counts, sums, state = case(*shape, device=device)
    if bad == "empty":
        counts[1] = 0
    else:
        sums[1, -2, 2] = float(bad)
    before = copies(state)
    ema_update(counts, sums, **state, decay=0.9, skip_unusable=True, backend=backend)
    assert same({n: v[1] for n, v in state.items()}, {n: v[1] for n, v in before.items()})
    for head in (0, 2):
        alone = {n: v[head].clone() for n, v in before.items()}
        ema_update(counts[head], sums[head], **alone, decay=0.9, backend=backend)
        assert same({n: v[head] for n, v in state.items()}, alone)


def check_autograd_is_told(backend: str, device: str = "cpu") -> None:
    counts, sums, state = case(13, 5, device=device)
    state["embedding"].zero_()
    x = torch.randn(2, 5, device=device, requires_grad=True)
    loss = (x @ state["embedding"].T).sum()
    ema_update(counts, sums, **state, decay=0.9, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
