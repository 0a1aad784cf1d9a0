"""Averages over a model's buffers, as torch.optim.swa_utils makes them, and states from when one of them was a bool."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pixelcnn, snail
from quantizer_helpers import buffers, normal, same
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvq.models import VQVAE2, ResidualVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "quantiser": lambda: VectorQuantizer(6, 4),
    "own-codebooks": lambda: VectorQuantizer(6, 4, heads=2, separate_codebook_per_head=True, init="kmeans"),
    "learnable": lambda: VectorQuantizer(6, 4, learnable_codebook=True),
    "residual": lambda: ResidualVQ(2, 6, 4),
    "autoencoder": lambda: VQVAE2.from_preset("digits"),
    "snail": snail,
    "pixelcnn": pixelcnn,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_buffers_can_be_averaged(name: str, kind: str) -> None:
    model = MODELS[name]()
    options: dict[str, Any] = {} if kind == "mean" else {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}
    average = AveragedModel(model, use_buffers=True, **options)
    tensors = [*model.parameters(), *model.buffers()]
    first = [value.detach().clone() for value in tensors]
    average.update_parameters(model)  # takes them as they are
    with torch.no_grad():
        for value in tensors:
            value += 1
    average.update_parameters(model)
    share = 0.5 if kind == "mean" else 0.25
    averages = [*average.module.parameters(), *average.module.buffers()]
    assert len(averages) == len(first)
    for found, before in zip(averages, first, strict=True):
        torch.testing.assert_close(found, before + share)


def test_the_average_of_a_codebook_that_started_late_has_started() -> None:
    quantizer = VectorQuantizer(6, 4, init="data", channels_last=True)
    average = AveragedModel(quantizer, use_buffers=True)
    average.update_parameters(quantizer)
    quantizer(normal(20, 4))
    average.update_parameters(quantizer)
    averaged = average.module
    assert isinstance(averaged, VectorQuantizer)
    assert float(averaged.initialized) == 0.5
    # One that never looks whether it has started.
    twin = copy.deepcopy(averaged)
    twin.init = "normal"
    for one in (averaged, twin):
        one.train()(normal(20, 4, seed=1))
    assert same(buffers(averaged), buffers(twin))
    assert float(averaged.initialized) == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_converted_codebooks_start(dtype: torch.dtype) -> None:
    quantizer = VectorQuantizer(6, 4, init="data", channels_last=True).to(dtype)
    assert quantizer.initialized.dtype == dtype
    x = normal(20, 4).to(dtype)
    codes = quantizer(x).quantized
    assert float(quantizer.initialized) == 1
    assert bool((codes[:, None] == x[None]).all(-1).any(1).all())


def test_the_type_does_not_follow_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        quantizer = VectorQuantizer(6, 4)
    finally:
        torch.set_default_dtype(before)
    assert quantizer.initialized.dtype == torch.float32
    assert quantizer.initialized.shape == ()


def with_bools(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As earlier versions saved it."""
    return {name: value.bool() if name.endswith("initialized") else value for name, value in state.items()}


@pytest.mark.parametrize("started", [False, True], ids=["not-started", "started"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_states_with_a_bool_load(started: bool, assign: bool, tmp_path: Path) -> None:
    first = ResidualVQ(2, 6, 4, init="data", channels_last=True)
    if started:
        first(normal(20, 4))
    save_file(with_bools(first.state_dict()), tmp_path / "old.safetensors")
    old = load_file(tmp_path / "old.safetensors")
    assert {value.dtype for value in old.values()} == {torch.bool, torch.float32}
    other = ResidualVQ(2, 6, 4, init="data", channels_last=True)
    other.load_state_dict(old, strict=True, assign=assign)
    for level in other.levels:
        assert level.initialized.dtype == torch.float32
        assert float(level.initialized) == started
    torch.manual_seed(0)
    want = first(normal(20, 4, seed=1))
    torch.manual_seed(0)
    assert torch.equal(other(normal(20, 4, seed=1)).quantized, want.quantized)
    AveragedModel(other, use_buffers=True).update_parameters(other)


def test_a_whole_module_with_a_bool_loads() -> None:
    quantizer = VectorQuantizer(6, 4)
    quantizer.initialized = torch.tensor(True)
    file = io.BytesIO()
    torch.save(quantizer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.initialized.dtype == torch.float32
    assert float(loaded.initialized) == 1


@pytest.mark.parametrize("started", [False, True], ids=["not-started", "started"])
def test_a_module_with_a_bool_takes_the_state(started: bool) -> None:
    """As an earlier version would load it."""
    quantizer = VectorQuantizer(6, 4, init="data", channels_last=True)
    if started:
        quantizer(normal(20, 4))
    holder = nn.Module()
    for name, value in with_bools(VectorQuantizer(6, 4).state_dict()).items():
        holder.register_buffer(name, value)
    holder.load_state_dict(quantizer.state_dict(), strict=True)
    assert bool(holder.initialized) == started
