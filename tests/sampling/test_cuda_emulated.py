"""The CUDA engine's own sources on an emulated device: logits, codes, and what every schedule must leave alone."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from emulation_helpers import Emulated, emulated, emulated_module, poisoned, reset  # noqa: F401
from engine_helpers import (
    engine_logits,
    given_to,
    grids,
    model_logits,
    needs_extension,
    own_error,
    request_of,
    require_same_codes,
    spread,
)
from helpers import pixelcnn, random_codes, refuses, snail
from hypothesis import given as drawing
from hypothesis import settings
from hypothesis import strategies as st
from plan_priors import GIVEN, PRIORS, every_given, every_prior
from test_engine_exactness import drawn, pixelcnns, pixelsnails, prior_of
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.models import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import fill, static_inputs
from fastvq.sampling.engines.pytorch import TorchGrid, TorchPlan, front_of, sample_torch
from fastvq.sampling.plan import compile_plan
from fastvq.sampling.request import SampleRequest, Settings

pytestmark = [pytest.mark.usefixtures("steady", "poisoned"), needs_extension]

# One of each way that levels, waits and draws come about.
FEW = ("strict", "inclusive", "pixelcnn")
every_kind = pytest.mark.parametrize("kind", FEW)


def cpu_codes(prior: Prior, request: SampleRequest) -> Tensor:
    return fill("cpu", prior, request, lambda *_: None, EngineOptions(threads=1))


def require_codes(device: Emulated, given: dict[str, Any], **changes: Any) -> Tensor:
    """Codes are those of the cpu engine at the same uniform numbers, up to certified margins."""
    request = request_of(device.prior, device.batch, given, **{"seed": 5, **changes})
    codes, _ = device.fill(request)
    chosen = {name: getattr(request.settings, name) for name in ("temperature", "top_k", "top_p")}
    wanted = cpu_codes(device.prior, request)
    share = require_same_codes(device.prior, codes, wanted, request.noise, given, known=request.known, **chosen)
    assert share > 0.6
    return codes


def require_logits(device: Emulated, codes: Tensor, given: dict[str, Any]) -> None:
    """Logits are as near to those in float64 as the model's own: the bound that the other engines have to keep."""
    exact = model_logits(copy.deepcopy(device.prior).double(), codes, given)
    own = own_error(device.prior, codes, given, exact)
    found = device.logits(codes, given)
    assert found.isfinite().all()
    bound = 4 * max(own, 8 * torch.finfo(torch.float32).eps * float(exact.abs().max()))
    worst = float((found - exact).abs().max())
    assert worst <= bound, f"{worst:.3g} > {bound:.3g} (model: {own:.3g})"


# Every architecture.


@every_given
@every_prior
def test_every_prior(emulated: ModuleType, kind: str, told: str) -> None:
    prior = spread(PRIORS[kind](**GIVEN[told]))
    codes, given = grids(prior, 3)
    reset(emulated, seed=7, hide_stores=True)
    device = Emulated(emulated, prior, 3)
    require_logits(device, codes, given)
    require_codes(device, given)


@settings(drawn, max_examples=25)
@drawing(config=st.one_of(pixelsnails(), pixelcnns()), seed=st.integers(0, 2**31), data=st.data())
def test_any_architecture(emulated: ModuleType, config: Any, seed: int, data: st.DataObject) -> None:
    prior = prior_of(config, seed)
    batch = data.draw(st.sampled_from((1, 2, 3)))
    blocks = data.draw(st.sampled_from((1, 2, 4, 7)))
    codes, given = grids(prior, batch, seed)
    reset(emulated, seed=seed, hide_stores=bool(seed % 2))
    require_logits(Emulated(emulated, prior, batch, blocks=blocks), codes, given)


# The call.


@pytest.mark.parametrize("batch", [1, 2, 8, 9])
@every_kind
def test_batches(emulated: ModuleType, kind: str, batch: int) -> None:
    prior = spread(PRIORS[kind](**GIVEN["both"]))
    codes, given = grids(prior, batch)
    device = Emulated(emulated, prior, batch)
    require_logits(device, codes, given)
    require_codes(device, given)


@pytest.mark.parametrize("blocks", [1, 2, 5])
@every_kind
def test_blocks(emulated: ModuleType, kind: str, blocks: int) -> None:
    prior = spread(PRIORS[kind]())
    codes, _ = grids(prior, 2)
    device = Emulated(emulated, prior, 2, blocks=blocks)
    assert device.step.native.blocks == blocks
    require_logits(device, codes, {})
    require_codes(device, {})


def test_as_many_blocks_as_the_device_holds(emulated: ModuleType) -> None:
    prior = spread(PRIORS["pixelcnn"]())
    reset(emulated, multiprocessors=6)
    device = Emulated(emulated, prior, 2, blocks=0)
    assert device.step.native.blocks == 6
    require_codes(device, {})
    with refuses(ArgumentError, "blocks: "):
        Emulated(emulated, prior, 2, blocks=7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [2, 9])
@every_kind
def test_weights_that_do_not_fit_are_streamed(emulated: ModuleType, kind: str, batch: int, precision: str) -> None:
    """Where they lie changes no bit."""
    prior = spread(PRIORS[kind](channels=16 if kind == "pixelcnn" else 20))
    codes, _ = grids(prior, batch)
    whole = Emulated(emulated, prior, batch, precision=precision)
    wanted = whole.logits(codes, {})
    weights = whole.step.native.stationary_bytes // whole.step.native.blocks
    kept = set()
    for share in (0.0, 0.3, 0.7):
        limit = whole.step.native.shared_bytes - int((1 - share) * weights)
        part = Emulated(emulated, prior, batch, precision=precision, shared_limit=limit)
        assert part.step.native.shared_bytes <= limit
        kept.add(part.step.native.stationary_bytes)
        assert torch.equal(part.logits(codes, {}), wanted)
    assert len({*kept, whole.step.native.stationary_bytes}) >= 3
    assert max(kept) < whole.step.native.stationary_bytes


def test_shared_memory_that_is_too_small(emulated: ModuleType) -> None:
    with pytest.raises(ArgumentError, match="shared"):
        Emulated(emulated, spread(PRIORS["strict"]()), 2, shared_limit=512)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (4, 0.9), (1, None), (40, 1.0)])
def test_settings(emulated: ModuleType, temperature: float, top_k: int | None, top_p: float | None) -> None:
    prior = spread(snail(num_codes=40, layers_per_block=2, shape=(3, 5)))
    chosen = Settings(temperature=temperature, top_k=top_k, top_p=top_p)
    for seed in (1, 2):
        reset(emulated, seed=seed)
        require_codes(Emulated(emulated, prior, 5), {}, settings=chosen, seed=seed)


@pytest.mark.parametrize("num_codes", [2, 63, 64, 65, 257])
def test_numbers_of_codes(emulated: ModuleType, num_codes: int) -> None:
    prior = spread(pixelcnn(num_codes=num_codes, shape=(2, 5)))
    device = Emulated(emulated, prior, 4)
    for chosen in (Settings(), Settings(top_k=num_codes // 2), Settings(top_p=0.6, top_k=num_codes)):
        require_codes(device, {}, settings=chosen)


@every_kind
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_known_codes_stay(emulated: ModuleType, kind: str, share: float) -> None:
    prior = spread(PRIORS[kind]())
    mask = torch.rand((6, 3, 4), generator=torch.Generator().manual_seed(3)) < share
    init = random_codes(6, 3, 4, seed=8)
    codes = require_codes(Emulated(emulated, prior, 6), {}, init_codes=init, mask=mask)
    assert torch.equal(codes[mask], init[mask])


def test_excluded_codes_are_never_drawn(emulated: ModuleType) -> None:
    prior: Any = spread(PRIORS["strict"]())
    with torch.no_grad():
        prior.output.bias[3:].fill_(float("-inf"))
    device = Emulated(emulated, prior, 6)
    for seed in range(2):
        request = request_of(prior, 6, {}, seed=seed)
        codes, _ = device.fill(request)
        assert torch.equal(codes, cpu_codes(prior, request))
        assert codes.max() == 2


@pytest.mark.parametrize("sample", [0, 1])
def test_logits_that_are_not_finite(emulated: ModuleType, sample: int) -> None:
    """Only the code 3 leads to infinity; only one sample has it, in the second row."""
    prior: Any = pixelcnn(layers=0)
    with torch.no_grad():
        prior.input_horizontal.weight[:, 3].fill_(1e38)
        prior.input_merge.weight.fill_(1e38)
        prior.hidden.weight.fill_(1e38)
    init = torch.zeros(2, 3, 4, dtype=torch.int64)
    init[sample, 1, 1] = 3
    known = torch.zeros(2, 3, 4, dtype=torch.bool)
    known[:, :2] = True
    known[sample, 1, 2] = False
    request = request_of(prior, 2, {}, seed=1, init_codes=init, mask=known)
    where = f"prior: its logits are not finite for sample {sample} of the micro-batch at row 1, column 2"
    for seed in range(4):
        reset(emulated, seed=seed)
        device = Emulated(emulated, prior, 2)
        with refuses(ArgumentError, where):
            device.fill(request)
        fine = request_of(prior, 2, {}, seed=1, init_codes=torch.zeros_like(init), mask=torch.ones_like(known))
        assert int(device.fill(fine)[0].max()) == 0  # and the next grid knows nothing of it


def test_a_trace(emulated: ModuleType) -> None:
    """Every instruction of every block at every column, in order, and without a place nothing is noted."""
    device = Emulated(emulated, spread(PRIORS["strict"]()), 2)
    native, width = device.step.native, device.prior.config.shape[1]
    times = torch.full((native.blocks, width, native.instructions, 5), -1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"count: expected {times.numel()}"):
        native.set_trace(times.data_ptr(), times.numel() - 1)
    native.set_trace(times.data_ptr(), times.numel())
    codes = require_codes(device, {})
    assert max(len(native.program(block)) for block in range(native.blocks)) == native.instructions
    for block in range(native.blocks):
        program = native.program(block)
        noted = times[block, :, : len(program)]
        assert (times[block, :, len(program) :] == -1).all()
        ends = torch.tensor([3 if instr["signals"] else 2 for instr in program])
        assert (noted[:, ends == 2, 3] == -1).all()
        for column in noted:
            marks = torch.cat([entry[: end + 1] for entry, end in zip(column, ends.tolist(), strict=True)])
            assert (marks.diff() >= 0).all()
        assert (noted[..., 4] > 0).all()
    before = times.clone()
    native.set_trace(0, times.numel())
    assert torch.equal(require_codes(device, {}), codes)
    assert torch.equal(times, before)


# Precisions.


class RoundedWeights:
    """Stands for a matrix W in total + x @ W: both are rounded to bfloat16, and the sum of products is float64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.bfloat16().double()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: tuple[Any, ...], options: Any = None) -> Tensor:
        total, x, self = arguments
        assert function is torch.addmm
        return total + (x.bfloat16().double() @ self.weight).float()


@torch.inference_mode()
def rounded_logits(prior: Prior, codes: Tensor, given: dict[str, Any]) -> Tensor:
    """Of the interpreter of plans, with products of the step phase as matrix instructions have them."""
    everything = torch.ones_like(codes, dtype=torch.bool)
    request = request_of(prior, len(codes), given, seed=0, init_codes=codes, mask=everything)
    plan = compile_plan(prior)
    weights = TorchPlan(plan, codes.device)
    weights.own = {
        index: [product._replace(weight=RoundedWeights(product.weight)) for product in products]
        for index, products in weights.own.items()
    }
    logits = torch.empty(*codes.shape, plan.num_codes)
    grid = TorchGrid(weights, front_of(plan, None), len(codes), static_inputs(prior, request))
    sample_torch(grid, request, lambda *_: None, logits=logits)
    return logits


@pytest.mark.parametrize("batch", [1, 9])
@every_prior
def test_bfloat16(emulated: ModuleType, kind: str, batch: int) -> None:
    prior = spread(PRIORS[kind]())
    codes, _ = grids(prior, batch)
    device = Emulated(emulated, prior, batch, precision="bfloat16")
    found, wanted = device.logits(codes, {}), rounded_logits(prior, codes, {})
    # Where float32 rounding decides how a number is rounded to bfloat16, one sample goes another way.
    off = (found - wanted).abs().flatten(1).amax(1)
    assert int((off < 2e-5).sum()) >= batch - 2, f"{off}"
    assert float(off.max()) < 0.1
    assert float((wanted - engine_logits("cpu", prior, codes, {}, bf16=True)).abs().max()) > 1e-3


# Bit for bit.


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@every_kind
def test_the_step_phase_does_not_depend_on_the_batch(emulated: ModuleType, kind: str, precision: str) -> None:
    """On a grid of one row there are no library products; without attention nothing is worked out beforehand."""
    prior = spread(PRIORS[kind](shape=(1, 6), **({"attention": False} if kind == "inclusive" else {})))
    codes, _ = grids(prior, 70)
    whole = Emulated(emulated, prior, 70, precision=precision).logits(codes, {})
    for batch in (1, 7, 8, 65):
        part = Emulated(emulated, prior, batch, precision=precision).logits(codes[:batch], {})
        assert torch.equal(part, whole[:batch])


@every_kind
def test_logits_do_not_depend_on_the_neighbours(emulated: ModuleType, kind: str) -> None:
    prior = spread(PRIORS[kind](**GIVEN["both"]))
    given = given_to(prior, 5)
    codes, others = (grids(prior, 5, seed)[0] for seed in (1, 2))
    others[3] = codes[3]
    device = Emulated(emulated, prior, 5)
    assert torch.equal(device.logits(codes, given)[3], device.logits(others, given)[3])
