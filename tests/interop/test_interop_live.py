"""Live modules of the widely used port are converted once for as long as they do not change."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from foreign_models import Causal2d, ForeignVQVAE, direction, randomise
from helpers import refuses
from interop_helpers import foreign_codes, foreign_prior, require_same_prior, require_same_vqvae
from torch import nn

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.interop import convert, live

pytestmark = [
    pytest.mark.usefixtures("steady"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated"),
]


def optimise(model: nn.Module) -> None:
    codes, condition = foreign_codes(model)
    model(codes, condition)[0].square().mean().backward()
    torch.optim.Adam(model.parameters(), lr=0.01).step()


def test_is_kept_while_nothing_changes() -> None:
    theirs = foreign_prior()
    ours = convert(theirs)
    codes, _ = foreign_codes(theirs)
    theirs(codes)  # zeroes masked entries, which are not weights
    assert convert(theirs) is ours
    assert convert(theirs, legacy=None) is ours
    assert convert(theirs, legacy=True) is not ours


def test_costs_little_when_kept() -> None:
    # As many modules and tensors as the largest model has.
    theirs = foreign_prior(n_block=4, n_res_block=4)
    assert len(theirs.state_dict()) == 226
    ours = convert(theirs)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        assert convert(theirs) is ours
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: optimise(m), id="optimiser"),
        pytest.param(lambda m: m.load_state_dict(foreign_prior(seed=3).state_dict()), id="load_state_dict"),
        pytest.param(lambda m: [p.data.mul_(0.9).add_(0.01) for p in m.parameters()], id="average-through-data"),
        pytest.param(lambda m: setattr(m.out[-1].conv.bias, "data", torch.ones(5)), id="data-replaced"),
        pytest.param(lambda m: setattr(m.out[-1].conv, "bias", nn.Parameter(torch.ones(5))), id="parameter-replaced"),
        pytest.param(lambda m: m.blocks.__setitem__(0, foreign_prior(seed=3).blocks[0]), id="module-replaced"),
    ],
)
def test_follows_changes(change: Callable[[nn.Module], object]) -> None:
    theirs = foreign_prior()
    before = convert(theirs)
    change(theirs)
    after = convert(theirs)
    assert after is not before
    require_same_prior(after, theirs)


def test_follows_every_tensor_changed_through_data() -> None:
    theirs = foreign_prior("conditioned-attention")
    for name, parameter in theirs.named_parameters():
        before = convert(theirs)
        parameter.data.add_(0.01)
        assert convert(theirs) is not before, name


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_follows_an_edit_of_one_element(place: str, spelling: str) -> None:
    theirs = foreign_prior("conditioned-attention", spelling=spelling)
    for name, parameter in theirs.named_parameters():
        before = convert(theirs)
        # The first row of a causal kernel has no masked entries.
        values = parameter.data[:, :, 0] if parameter.ndim == 4 else parameter.data
        index = {"first": 0, "middle": values.numel() // 2, "last": values.numel() - 1}[place]
        values[tuple(np.unravel_index(index, values.shape))] += 0.1
        assert convert(theirs) is not before, name
    require_same_prior(convert(theirs), theirs)


def test_follows_elements_that_trade_places() -> None:
    theirs = foreign_prior()
    values = theirs.out[-1].conv.bias.detach().numpy()
    convert(theirs)
    values[[0, -1]] = values[[-1, 0]]
    require_same_prior(convert(theirs), theirs)


def test_masked_entries_are_no_weights() -> None:
    theirs = foreign_prior()
    causal = next(m for m in theirs.modules() if isinstance(m, Causal2d) and m.masked is not None)
    row = direction(causal.conv.conv).data[:, :, -1]
    ours = convert(theirs)
    for _ in range(2):
        row[:, :, causal.masked :] += 1
        assert convert(theirs) is ours
    row[0, 0, causal.masked - 1] += 1
    assert convert(theirs) is not ours
    require_same_prior(convert(theirs), theirs)


def test_converts_once_for_masked_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = foreign_prior()
    calls = []
    build = live.build
    monkeypatch.setattr(live, "build", lambda *args: calls.append(args) or build(*args))
    for _ in range(4):
        convert(theirs)
        theirs(foreign_codes(theirs)[0])
    assert len(calls) == 2


def test_follows_tensors_in_another_memory_format() -> None:
    theirs = foreign_prior("bottom").to(memory_format=torch.channels_last)
    parameter = direction(theirs.blocks[0].resblocks[0].conv1.conv.conv)
    assert not parameter.is_contiguous()
    before = convert(theirs)
    theirs(*foreign_codes(theirs))
    assert convert(theirs) is before
    parameter.data.mul_(torch.rand_like(parameter))
    require_same_prior(convert(theirs), theirs)


def test_follows_a_codebook_moved_through_data() -> None:
    theirs = randomise(ForeignVQVAE())
    convert(theirs)
    theirs.quantize_b.embed.data.mul_(0.5)
    require_same_vqvae(convert(theirs), theirs)


def test_copies_weights() -> None:
    theirs = foreign_prior()
    ours = convert(theirs)
    codes, _ = foreign_codes(theirs)
    before = ours(codes)
    optimise(theirs)
    assert torch.equal(ours(codes), before)


def test_reads_settings_of_the_module() -> None:
    ours = convert(foreign_prior("conditioned-attention"))
    assert ours.config.attention_heads == 3
    assert ours.config.dropout == 0.25


def test_leaves_the_module_and_the_generator_alone() -> None:
    theirs = foreign_prior().train()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    state = torch.get_rng_state()
    assert not convert(theirs).training
    assert theirs.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


def test_inside_a_wrapper() -> None:
    theirs = foreign_prior(inplace=True)
    require_same_prior(convert(nn.DataParallel(theirs)), theirs)


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        theirs = foreign_prior()
        ours = convert(theirs)
        assert convert(theirs) is ours
        require_same_prior(ours, theirs)


def test_does_not_keep_modules_alive() -> None:
    theirs = foreign_prior()
    convert(theirs)
    watch, memory = weakref.ref(theirs), weakref.ref(theirs.out[-1].conv.bias)
    del theirs
    gc.collect()
    assert watch() is None
    assert memory() is None


def test_errors() -> None:
    with refuses(ArgumentTypeError, "module: expected a torch.nn.Module, got dict"):
        convert({})  # type: ignore[arg-type]
    with refuses(ArgumentTypeError, "legacy: expected a bool or None, got str 'yes'"):
        convert(foreign_prior(), legacy="yes")  # type: ignore[arg-type]
    with refuses(ArgumentError, "module: unknown layout"):
        convert(nn.Linear(2, 2))
    theirs = foreign_prior()
    theirs.blocks[0].resblocks[1].activation.inplace = True
    with refuses(ArgumentError, "module: some of its residual blocks work in place and others do not"):
        convert(theirs)
    theirs = foreign_prior()
    theirs.blocks[0].causal_attention.n_head = 3
    with refuses(ArgumentError, r"module: expected an attribute n_head, the same in all attention blocks, got \[3, 2"):
        convert(theirs)
