"""The ``cuda`` engine along a front: its kernels in Triton's interpreter, compiled for three chips, and on a GPU."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from engine_helpers import given_to, grids, model_logits, own_error, request_of, require_same_codes, spread
from helpers import pixelcnn, random_codes, refuses, snail
from plan_priors import GIVEN, PRIORS
from torch import Tensor
from triton_helpers import (
    Check,
    Launch,
    Recorder,
    assert_fits,
    checked_in_both,
    needs_compiler,
    needs_gpu,
    needs_triton,
    serve,
)

from fastvq.errors import ArgumentError, UnavailableError
from fastvq.kernels.front_tiles import (
    PRODUCT_CANDIDATES,
    TAIL_CANDIDATES,
    ProductTiles,
    TailTiles,
    product_candidates,
    product_tiles,
)
from fastvq.kernels.launch import Device, hardware
from fastvq.kernels.tuning import asking
from fastvq.models import Prior
from fastvq.sampling import EngineOptions, sample
from fastvq.sampling.engines import cuda_front, fill, front_weights, static_inputs
from fastvq.sampling.engines.base import RowDone
from fastvq.sampling.engines.cuda_front import FrontGrid, FrontPlan, is_filtered, takes_front
from fastvq.sampling.engines.front_program import FrontProgram
from fastvq.sampling.engines.front_weights import FrontWeights, as_planes
from fastvq.sampling.engines.front_work import Work, why_no_front
from fastvq.sampling.engines.prepared import prepared
from fastvq.sampling.engines.state import steady_statics
from fastvq.sampling.plan import compile_plan
from fastvq.sampling.request import SampleRequest, Settings

pytestmark = pytest.mark.usefixtures("steady")

# Few programs for the interpreter, in which each costs as much as on a GPU all of them.
PROGRAMS = 4
CPU = torch.device("cpu")
BARE = partial(snail, attention=False)
FRONTS: dict[str, Callable[..., Prior]] = {
    "strict": lambda **c: BARE(blocks=2, **c),
    "even": lambda **c: BARE(kernel_size=4, **c),
    "inclusive": lambda **c: BARE(mask="inclusive", **c),
    "legacy": lambda **c: BARE(legacy_skip=True, layers_per_block=2, **c),
    "concat-elu": lambda **c: BARE(output_blocks=1, activation="concat_elu", **c),
    "pixelcnn": PRIORS["pixelcnn-no-layers"],
}


class Job:
    """A request for a prior, and the grid that fills it."""

    @torch.inference_mode()
    def __init__(
        self,
        prior: Prior,
        n: int,
        device: str,
        *,
        precision: Any = "float32",
        programs: int = PROGRAMS,
        request: SampleRequest | None = None,
        **changes: Any,
    ) -> None:
        self.prior = copy.deepcopy(prior).to(device)
        self.given = given_to(prior, n)
        made = request_of(self.prior, n, self.given, **{"seed": 4, **changes})
        self.request = made if request is None else request
        self.weights = FrontWeights(Work.front(compile_plan(prior)), torch.device(device), precision, programs=programs)
        self.statics = static_inputs(self.prior, self.request)
        filtered = is_filtered(self.request.settings, prior.config.num_codes)
        self.grid = FrontGrid(self.weights, n, self.statics, filtered=filtered, keep_logits=True)

    @torch.inference_mode()
    def run(self, row_done: RowDone = lambda rows, codes: None) -> tuple[Tensor, Tensor]:
        """Codes, and logits [n, H, W, K]."""
        logits = self.grid.logits
        assert logits is not None
        logits.fill_(math.nan)
        codes = self.grid.fill(self.request, self.statics, row_done)
        return codes.cpu(), logits.cpu()

    def wanted(self, prior: Prior) -> Tensor:
        """The codes of the interpreter of plans."""
        return fill("torch", self.prior, self.request, lambda *_: None).cpu()


def check_codes(make: Callable[[], Prior], device: str, **changes: Any) -> str:
    """Those of the ``torch`` engine, and the model's logits to float32 rounding."""
    prior = spread(make())
    height, width = prior.config.shape
    job = Job(prior, 2, device, **changes)
    rows: list[int] = []
    codes, logits = job.run(lambda count, _: rows.append(count))
    assert rows == [1] * height
    known, settings = job.request.known.cpu(), job.request.settings
    drawn = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    share = require_same_codes(
        prior, codes, job.wanted(prior), job.request.noise.cpu(), job.given, known=known, **drawn
    )  # fmt: skip
    assert codes.unique().numel() > 1
    exact = model_logits(copy.deepcopy(prior).double(), codes, job.given)
    own = own_error(prior, codes, job.given, exact)
    bound = 4 * max(own, 8 * torch.finfo(torch.float32).eps * float(exact.abs().max()))
    error = float((logits - exact).abs().max())
    assert error <= bound, f"{error:.3g} > {bound:.3g}"
    return f"{height} x {width}: {share:.0%} of grids identical, logits {error / bound:.2f} of the bound"


def check_known(device: str) -> str:
    make = partial(PRIORS["pixelcnn-no-layers"], num_codes=7)
    init = random_codes(2, 3, 4, num_codes=7, seed=9)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    return check_codes(make, device, init_codes=init, mask=mask)


def check_drawn(device: str, **settings: Any) -> str:
    return check_codes(partial(PRIORS["pixelcnn-no-layers"], num_codes=23), device, settings=Settings(**settings))


def in_order(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A product added up in one order; in NumPy's it depends on the place of a row."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total += a[:, k : k + 1] * b[k]
    return total


def check_bits(precision: str, device: str) -> None:
    """Of a sample's logits: whatever it is sampled with, and however its sums are shared out among programs."""
    prior = spread(BARE(channels=6, num_classes=3, shape=(2, 3)))
    with mock.patch("numpy.matmul", in_order):
        whole = Job(prior, 5, device, precision=precision)
        assert any(len(one.early) > 1 for one in whole.weights.cut.sums.values())
        codes, logits = whole.run()
        for n in (1, 2):
            request = whole.request.rows(torch.arange(n, device=device) + 5 - n)
            few = Job(prior, n, device, precision=precision, request=request)
            found, bits = few.run()
            assert torch.equal(found, codes[5 - n :])
            assert torch.equal(bits.view(torch.int32), logits[5 - n :].view(torch.int32))


def check_bfloat16(device: str) -> str:
    """Weights and activations are rounded once each, by up to 2^-9: as if weights had moved by 2^-8.

    Triton's interpreter cuts activations off instead, by up to 2^-8.
    """
    prior = spread(BARE(channels=6, residual_channels=5, kernel_size=5, shape=(2, 5)))
    codes, given = grids(prior, 2)
    everything = torch.ones_like(codes, dtype=torch.bool)
    job = Job(prior, 2, device, precision="bfloat16", init_codes=codes, mask=everything)
    found, logits = job.run()
    assert torch.equal(found, codes)
    exact = model_logits(copy.deepcopy(prior).double(), codes, given)
    moved = own_error(prior, codes, given, exact, move=2**-7 if device == "cpu" else 2**-8)
    error = float((logits - exact).abs().max())
    # Nearer than this would be float32.
    assert 0.02 * moved < error <= 4 * moved, f"{error:.3g}, weights that move give {moved:.3g}"
    return f"logits off by {error:.2g}; weights that move as much give {moved:.2g}"


def check_not_finite(device: str) -> None:
    """Only the code 3 leads to infinity, and only sample 1 has it; the next grid knows nothing of it."""
    prior: Any = pixelcnn(layers=0)
    with torch.no_grad():
        for weight in (prior.input_horizontal.weight[:, 3], prior.input_merge.weight, prior.hidden.weight):
            weight.fill_(1e38)
    init = torch.zeros(2, 3, 4, dtype=torch.int64)
    init[1, 1, 1] = 3
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 1, 2] = mask[:, 2] = False
    job = Job(prior, 2, device, init_codes=init, mask=mask)
    with refuses(ArgumentError, "prior: its logits are not finite for sample 1 of the micro-batch at row 1, column 2$"):
        job.run()
    job.request = request_of(job.prior, 2, {}, seed=1, init_codes=torch.zeros_like(init), mask=torch.ones_like(mask))
    assert int(job.run()[0].max()) == 0


def check_excluded(device: str) -> None:
    prior: Any = spread(pixelcnn(layers=0))
    with torch.no_grad():
        prior.output.bias[2:].fill_(-math.inf)
    codes, _ = Job(prior, 3, device).run()
    assert codes.max() == 1


def check_other_tiles(device: str) -> str:
    """Codes with tiles of other sizes than those of the rules."""
    capability = hardware(torch.device(device)).capability
    with (
        asking(("front_product", capability, "float32 positions 32"), ProductTiles(16, 128, 32, 4, 3)),
        asking(("front_tail", capability, "any"), TailTiles(8, 128, 8)),
    ):
        return check_codes(RAGGED, device)


def check_planes(device: str) -> None:
    """Three of bfloat16 are float32, to the last bit and up to the largest number, and so is infinity."""
    from fastvq.kernels.front_planes import _planes_kernel

    numbers = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-75, 75).repeat(20)
    largest = torch.finfo(torch.float32).max
    numbers[:8] = torch.tensor([0, largest, -largest, 3.3e38, 1e-20, math.inf, -math.inf, math.nan])
    numbers = numbers.to(device)
    for planes in (1, 3):
        found = torch.full((planes, 3000), math.nan, dtype=torch.bfloat16, device=device)
        places = torch.tensor([[0, 1, 0, 0, 3000, 0, 0, 0]], device=device)
        step = torch.ones(1, dtype=torch.int32, device=device)
        _planes_kernel[(3, 1, 1)](step, numbers, found, places, 3000, UNIT=1, PLANES=planes, BLOCK=1024)
        wanted = as_planes(numbers, planes)
        if planes == 3:
            for parts in (found, wanted):
                torch.testing.assert_close(parts.double().sum(0).float(), numbers, rtol=0, atol=0, equal_nan=True)
                assert parts[:2, :7].isfinite().all()
        if device != "cpu":  # Triton's interpreter cuts off what is to be rounded
            assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


RAGGED = partial(BARE, shape=(3, 5), channels=34, residual_channels=12, kernel_size=3, form="symmetric")
GROUPS: dict[str, dict[str, Check]] = {
    "codes": {
        "strict-both": lambda d: check_codes(partial(FRONTS["strict"], **GIVEN["both"]), d),
        "even-labels": lambda d: check_codes(partial(FRONTS["even"], **GIVEN["labels"]), d),
        "inclusive-condition": lambda d: check_codes(partial(FRONTS["inclusive"], **GIVEN["condition"]), d),
        "pixelcnn-both": lambda d: check_codes(partial(FRONTS["pixelcnn"], **GIVEN["both"]), d),
    },
    "shapes": {
        "legacy": lambda d: check_codes(FRONTS["legacy"], d),
        "concat-elu": lambda d: check_codes(FRONTS["concat-elu"], d),
        "ragged": lambda d: check_codes(RAGGED, d),
        "other-tiles": check_other_tiles,
        "many-parts": lambda d: check_codes(partial(FRONTS["even"], shape=(2, 5)), d, programs=64),
    },
    "drawn": {
        "known": check_known,
        "top-k": lambda d: check_drawn(d, temperature=0.7, top_k=5),
        "top-p": lambda d: check_drawn(d, top_p=0.6),
        "both": lambda d: check_drawn(d, temperature=1.3, top_k=9, top_p=0.8),
        "not-finite": check_not_finite,
        "excluded": check_excluded,
    },
    "bits": {
        "float32": partial(check_bits, "float32"),
        "bfloat16": partial(check_bits, "bfloat16"),
        "near-float32": check_bfloat16,
        "planes": check_planes,
    },
}
test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


# The launches of a step.


@pytest.mark.parametrize("kind", FRONTS)
def test_every_operation_is_worked_out_once_and_before_it_is_read(kind: str) -> None:
    plan = compile_plan(FRONTS[kind](shape=(4, 8), **GIVEN["alone"]))
    program = FrontProgram(Work.front(plan))
    known = {op.index for op in plan.ops if op.kind == "static"}
    worked_out: list[int] = []
    for level in program.levels:
        for op in level.products:
            assert {t.source for t in op.terms if (0, 0) in t.taps} <= known
        sums = {op.index for op in level.products}
        for stage in level.stages:
            made: set[int] = set()
            for chain in stage:
                last: int | None = None
                for one in chain:
                    assert one.source == "lookup" or one.read in (sums if one.source == "sum" else known)
                    assert one.source != "values" or one.read in program.values
                    if one.from_last:
                        assert last == one.operand
                    elif one.operand is not None:
                        assert one.operand in known & program.values
                    assert last is None or one.from_last
                    made |= {one.op} | ({one.activation} if one.activation is not None else set())
                    worked_out.append(one.op)
                    last = one.leaves
            known |= made
    stored = program.values | program.features
    assert stored <= known
    assert len(set(worked_out)) == len(worked_out)


def test_launches_of_priors() -> None:
    """Three blocks of strict layers share the level of their convolutions; inclusive ones are two levels a layer."""

    def shape(mask: str) -> list[tuple[int, list[int]]]:
        prior = BARE(mask=mask, blocks=3, layers_per_block=2, shape=(4, 8))
        return [
            (len(one.products), [len(stage) for stage in one.stages])
            for one in FrontProgram(Work.front(compile_plan(prior))).levels
        ]

    # Look-up and first block; convolutions of 6 layers; gates of the other blocks.
    assert shape("strict") == [(12, [1 + 6 + 4]), (1, [1]), (1, [1]), (1, [1]), (1, [1])]
    assert shape("inclusive") == [(0, [1]), *[(1, [1])] * (3 * (2 * 2 + 1) + 1)]


# The choice.


def test_priors_that_take_the_front() -> None:
    front, attention = compile_plan(BARE(shape=(4, 8))), compile_plan(snail(shape=(4, 8)))
    assert why_no_front(front) is None
    assert why_no_front(attention) == "its attention reads all positions before"
    assert takes_front(front, EngineOptions())
    assert takes_front(front, EngineOptions(tile=1))
    assert not takes_front(front, EngineOptions(tile=8))
    assert not takes_front(front, EngineOptions(row_kernel="library"))
    assert not takes_front(attention, EngineOptions())
    assert not takes_front(attention, EngineOptions(tile=8))
    with refuses(ArgumentError, "tile: the cuda engine samples tiles of 1 column or of all 8, got 2"):
        takes_front(front, EngineOptions(tile=2))
    with refuses(ArgumentError, "tile: expected 8, the width of the grid, got 1: its attention reads all"):
        takes_front(attention, EngineOptions(tile=1))
    with refuses(ArgumentError, "row_kernel: there is no row phase along a front, got 'library'"):
        takes_front(front, EngineOptions(tile=1, row_kernel="library"))


@needs_triton
@needs_compiler
def test_refusals() -> None:
    prior = BARE(shape=(4, 8))
    with refuses(UnavailableError, "engine: 'cuda' was asked for but cannot run here: it needs a GPU"):
        FrontPlan.of(prepared(prior), EngineOptions())
    with (
        mock.patch.object(cuda_front, "why_no_front_kernels", return_value=None),
        refuses(UnavailableError, "cuda_graph: it needs a GPU, the plan is on cpu"),
    ):
        FrontPlan.of(prepared(prior), EngineOptions(cuda_graph=True))
    with torch.no_grad():
        prior.get_submodule("output").weight[0].fill_(math.nan)  # type: ignore[index]
    with refuses(ArgumentError, "prior: its weights hold NaN or infinite values"):
        FrontWeights(Work.front(compile_plan(prior)), CPU, "float32")


# Compiled.


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from fastvq.kernels import front_draw, front_product, front_tail

    found: list[Launch] = []
    for module, name in (
        (front_product, "_product_kernel"),
        (front_tail, "_tail_kernel"),
        (front_draw, "_draw_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("precision", "filtered", "capability"),
    [(p, p == "bfloat16", c) for p, c in itertools.product(("float32", "bfloat16"), (80, 90, 100))],
)
def test_compiled_kernels_fit_the_chip(
    precision: Any, filtered: bool, capability: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a layer of 256 channels over 64 x 64 positions launches them."""
    prior = BARE(shape=(64, 64), channels=256, residual_channels=256, kernel_size=5, num_codes=512)
    monkeypatch.setattr(front_weights, "hardware", lambda device: Device(capability, 132))
    weights = FrontWeights(Work.front(compile_plan(prior)), torch.device("meta"), precision)
    statics = {"background": torch.empty(1, 2, 64, 64, device="meta")}
    FrontGrid(weights, 16, statics, filtered=filtered).enqueue_step()
    kernels = {launch.kernel.__name__: launch for launch in launches}
    assert set(kernels) == {"_product_kernel", "_tail_kernel", "_draw_kernel"}
    fast = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    for name, launch in kernels.items():
        resources = launch.compile(capability)
        print(f"sm_{capability} {precision} {name}: {resources.registers} registers, {resources.stack} bytes of stack")
        assert_fits(resources, capability)
        if name == "_product_kernel":
            # Vectors of 16 bytes are copied ahead of the products, which are tensor cores'.
            assert "cp.async.cg.shared.global" in resources.ptx
            assert fast in resources.ptx


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "sizes", "tiles"),
    [
        *[("product", sizes, tiles) for sizes in PRODUCT_CANDIDATES for tiles in product_candidates(*sizes, 90)],
        *[("tail", None, tiles) for tiles in TAIL_CANDIDATES],
    ],
    ids=str,
)
def test_candidates_fit_a_hopper(kernel: str, sizes: Any, tiles: Any, launches: list[Launch]) -> None:
    prior = BARE(shape=(64, 64), channels=256, residual_channels=256, kernel_size=5, num_codes=512)
    precision, most = sizes if kernel == "product" else ("float32", 1024)
    wanted = f"{precision} positions {most}" if kernel == "product" else "any"
    with asking((f"front_{kernel}", 90, wanted), tiles):
        weights = FrontWeights(Work.front(compile_plan(prior)), torch.device("meta"), precision)
        batch = max(1, most // weights.plan.front(1).rows)
        FrontGrid(weights, batch, {"background": torch.empty(1, 2, 64, 64, device="meta")}).enqueue_step()
    launch = next(one for one in launches if one.kernel.__name__ == f"_{kernel}_kernel")
    assert launch.options["num_warps"] == tiles.warps
    assert_fits(launch.compile(90), 90)


# On a GPU, through the public calls.


@needs_triton
@needs_gpu
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("kind", FRONTS)
def test_samples_of_the_naive_engine(kind: str, graph: bool) -> None:
    prior = spread(FRONTS[kind](shape=(6, 12), **GIVEN["labels"]))
    given = given_to(prior, 5)
    wanted = sample(prior, 5, seed=1, engine="naive", **given)
    noise = request_of(prior, 5, given, seed=1).noise
    on_gpu = copy.deepcopy(prior).cuda()
    for _ in range(2):  # a graph is recorded and then replayed
        found = sample(on_gpu, 5, seed=1, engine="cuda", options=EngineOptions(cuda_graph=graph), **given).cpu()
        require_same_codes(prior, found, wanted, noise, given)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_conditions_are_worked_out_in_batches_of_one_size(device: str) -> None:
    """On a GPU their bits depend neither on the number of samples nor on the place among them."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is available")
    told = {**GIVEN["both"], "condition_shapes": ((4, 8), (8, 16)), "condition_channels": 64, "condition_blocks": 2}
    prior = BARE(shape=(8, 16), **told).to(device)
    request = request_of(prior, 9, given_to(prior, 9), seed=1)
    with torch.inference_mode():
        whole, wanted = steady_statics(prior, request), static_inputs(prior, request)
        assert list(whole) == list(wanted)
        for name, x in wanted.items():
            torch.testing.assert_close(whole[name], x, rtol=1e-5, atol=1e-5)
        for rows in (torch.tensor([8]), torch.tensor([6, 2, 7, 1, 0])):
            some = steady_statics(prior, request.rows(rows.to(device)))["context"]
            assert some.shape == (len(rows), *whole["context"].shape[1:])
            if device == "cuda":
                assert torch.equal(some, whole["context"][rows.to(device)])


@needs_triton
@needs_gpu
def test_recorded_steps_are_those_enqueued_one_by_one() -> None:
    prior = spread(BARE(shape=(6, 12), num_classes=3))
    logits = []
    for recorded in (False, True, True):
        job, rows = Job(prior, 3, "cuda"), []
        with torch.inference_mode():
            job.grid.fill(job.request, job.statics, lambda count, _, rows=rows: rows.append(count), recorded=recorded)
        assert rows == [1] * 6
        assert job.grid.logits is not None
        logits.append(job.grid.logits.view(torch.int32))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@needs_triton
@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_of_large_batches(precision: str) -> None:
    """Also where tiles of products are the largest."""
    prior = spread(BARE(shape=(8, 16), channels=128, residual_channels=128, layers_per_block=2, kernel_size=5))
    many = Job(prior, 600, "cuda", precision=precision, programs=264)
    codes, logits = many.run()
    for n in (1, 64):
        rows = torch.arange(n, device="cuda") + 600 - n
        few = Job(prior, n, "cuda", precision=precision, programs=264, request=many.request.rows(rows))
        found, bits = few.run()
        assert torch.equal(found, codes[600 - n :])
        assert torch.equal(bits.view(torch.int32), logits[600 - n :].view(torch.int32))


@needs_triton
@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_tiles(precision: str) -> None:
    """Those of logits, with all tiles that products may have for any number of positions."""
    prior = spread(BARE(shape=(8, 16), channels=128, residual_channels=128, layers_per_block=2, kernel_size=5))
    capability, wanted = hardware(torch.device("cuda")).capability, None
    rule = product_tiles(precision, 48, capability)
    every = {t for p, most in PRODUCT_CANDIDATES if p == precision for t in product_candidates(p, most, capability)}
    for tiles in [rule, *sorted(every - {rule})]:
        with asking(("front_product", capability, f"{precision} positions 64"), tiles):
            job = Job(prior, 8, "cuda", precision=precision, programs=264)
            assert (job.grid.layout.capacity, job.grid.layout.tiles) == (48, tiles)
            bits = job.run()[1].view(torch.int32)
        wanted = bits if wanted is None else wanted
        assert torch.equal(bits, wanted), tiles


@needs_triton
@needs_gpu
def test_memory() -> None:
    """What a grid takes is what its buffers hold."""
    prior = spread(BARE(shape=(16, 32), channels=64, residual_channels=64, kernel_size=5)).cuda()
    request = request_of(prior, 16, {}, seed=1)
    fill("cuda", prior, request, lambda *_: None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fill("cuda", prior, request, lambda *_: None)
    taken = torch.cuda.max_memory_allocated() - before
    weights = FrontWeights(Work.front(compile_plan(prior)), torch.device("meta"), "float32")
    statics = {"background": torch.empty(1, 2, 16, 32, device="meta")}
    grid = FrontGrid(weights, 16, statics)
    assert taken <= 1.1 * grid.bytes + 2**20


if __name__ == "__main__":
    serve(GROUPS)
