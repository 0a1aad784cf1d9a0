"""What the ``cuda`` engine works out before a row starts: in Triton's interpreter, steps on the emulated device.

Its kernels are compiled for three chips as well, and run on a GPU where there is one.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cuda_stand_in import StandIn
from emulation_helpers import Emulated, new_module, reset
from engine_helpers import grids, model_logits, own_error, request_of, require_same_codes, spread
from helpers import pixelcnn, snail
from plan_priors import GIVEN, PRIORS
from test_cuda_front import PROGRAMS, in_order
from torch.utils._python_dispatch import TorchDispatchMode
from triton_helpers import (
    Check,
    Launch,
    Recorder,
    assert_fits,
    assert_interpreted,
    checked_in_both,
    names,
    needs_compiler,
    needs_triton,
    serve,
)

from fastvq import _engine
from fastvq._precision import full_float32
from fastvq.kernels.launch import Device
from fastvq.models import Prior
from fastvq.sampling import EngineOptions, describe, sample
from fastvq.sampling.engines import cuda, cuda_grid, fill, front_weights, static_inputs
from fastvq.sampling.engines.cuda import CudaEngine, why_library_rows
from fastvq.sampling.engines.cuda_grid import CudaStep, Grid, make_views
from fastvq.sampling.engines.cuda_rows import ProductState, RowProducts, product_bytes, row_launches
from fastvq.sampling.engines.front_work import Work, why_no_rows
from fastvq.sampling.engines.state import CompiledPlan, GridState, common_bytes
from fastvq.sampling.engines.step_tables import PlanTables, fill_all_views, fill_views, make_scratch
from fastvq.sampling.plan import compile_plan
from fastvq.sampling.request import SampleRequest, Settings

pytestmark = pytest.mark.usefixtures("steady")

CPU = torch.device("cpu")
KINDS: dict[str, Callable[..., Prior]] = {
    **PRIORS,
    "one-layer": lambda **c: snail(layers_per_block=1, kernel_size=5, **c),
    "pixelcnn-one-layer": lambda **c: pixelcnn(layers=1, **c),
}
SHAPES: dict[str, Callable[..., Prior]] = {
    "wide": lambda **c: snail(shape=(3, 7), channels=40, residual_channels=12, kernel_size=5, **c),
    "one-column": lambda **c: snail(shape=(3, 1), **c),
    "one-row": lambda **c: snail(shape=(1, 4), **c),
}


class Rows:
    """Both row phases of a prior, and what the steps of a row would leave behind."""

    def __init__(self, prior: Prior, batch: int, device: str, *, programs: int = PROGRAMS) -> None:
        self.plan, self.batch, self.device = compile_plan(prior), batch, torch.device(device)
        self.codes, given = grids(prior, batch)
        statics = static_inputs(prior, request_of(prior, batch, given, seed=0))
        self.library = GridState(CompiledPlan(self.plan, self.device), batch, statics)
        products = RowProducts(self.plan, self.device, "float32", programs=programs)
        self.products = ProductState(products, batch, statics)
        self._generator = torch.Generator().manual_seed(0)

    def begin(self) -> None:
        for state in (self.library, self.products):
            state.begin(self.codes.to(self.device))

    def begin_row(self, row: int) -> None:
        for state in (self.library, self.products):
            state.begin_row(row)

    def finish_row(self) -> None:
        """Random vectors in all caches that steps write."""
        for index in self.plan.history:
            if self.plan.timing[index] != "row":
                sizes = (self.batch, self.plan.shape[1], self.plan.ops[index].channels)
                values = torch.randn(sizes, generator=self._generator).to(self.device)
                for state in (self.library, self.products):
                    state.cache_row(index).copy_(values)


@torch.inference_mode()
def check_rows(make: Callable[[], Prior], device: str, *, again: bool = False) -> str:
    """The values of PyTorch's convolutions for every row of random caches, to float32 rounding.

    Args:
        again: for a second grid as well, which must know nothing of the first.
    """
    prior = spread(make()).to(device)
    rows, largest, compared = Rows(prior, 2, device), 0.0, 0
    plan = rows.plan
    steps = list(plan.step_ops())
    needed = {op.index for op in steps if op.kind in ("affine", "lookup")}
    needed |= {source for op in steps for source in op.sources if plan.timing[source] == "row"}
    for _ in range(1 + again):
        rows.begin()
        for row in range(plan.shape[0]):
            with full_float32(torch.device(device)):
                rows.begin_row(row)
            assert needed <= set(rows.products.rows)
            for index, found in rows.products.rows.items():
                wanted = rows.library.rows[index]
                scale = float(wanted.abs().max()) + 1e-6
                largest = max(largest, float((found - wanted).abs().max()) / scale)
                compared += 1
            rows.finish_row()
    assert largest < 2e-6, largest
    return f"{compared} operations, relative difference {largest:.1e}"


class WithProducts(Emulated):
    """The emulated device behind rows that start by the products of the front."""

    def __init__(self, prior: Prior, batch: int, precision: Any = "float32") -> None:
        super().__init__(_emulated(), prior, batch, precision=precision)
        self.products = RowProducts(self.compiled.plan, CPU, precision, programs=PROGRAMS)

    @torch.inference_mode()
    def state(self, request: SampleRequest) -> ProductState:
        return ProductState(self.products, self.batch, static_inputs(self.prior, request))


def _emulated() -> types.ModuleType:
    module = new_module()
    reset(module)
    return module


def check_grids(kind: str, told: str, batch: int, **changes: Any) -> str:
    """Codes are those of the cpu engine up to certified margins; logits are as near to float64 as other engines'."""
    prior = spread(KINDS[kind](**GIVEN[told]))
    given = grids(prior, batch)[1]
    request = request_of(prior, batch, given, **{"seed": 5, **changes})
    codes, logits = WithProducts(prior, batch).fill(request, logits=True)
    wanted = fill("cpu", prior, request, lambda *_: None, EngineOptions(threads=1))
    chosen = {name: getattr(request.settings, name) for name in ("temperature", "top_k", "top_p")}
    share = require_same_codes(prior, codes, wanted, request.noise, given, known=request.known, **chosen)
    assert codes.unique().numel() > 1
    exact = model_logits(copy.deepcopy(prior).double(), codes, given)
    own = own_error(prior, codes, given, exact)
    bound = 4 * max(own, 8 * torch.finfo(torch.float32).eps * float(exact.abs().max()))
    error = float((logits - exact).abs().max())
    assert error <= bound, f"{error:.3g} > {bound:.3g}"
    return f"{share:.0%} of grids identical, logits {error / bound:.2f} of the bound"


def check_bfloat16(kind: str, batch: int) -> str:
    """Logits are off as if weights had moved by 2^-7: in the interpreter, which cuts activations off."""
    prior = spread(PRIORS[kind]())
    codes, given = grids(prior, batch)
    found = WithProducts(prior, batch, "bfloat16").logits(codes, given)
    exact = model_logits(copy.deepcopy(prior).double(), codes, given)
    moved = own_error(prior, codes, given, exact, move=2**-7)
    error = float((found - exact).abs().max())
    # Nearer than this would be float32.
    assert 0.02 * moved < error <= 4 * moved, f"{error:.3g}, weights that move give {moved:.3g}"
    return f"logits off by {error:.2g}; weights that move as much give {moved:.2g}"


def check_bits(kind: str, precision: str = "float32") -> None:
    """Of a sample's logits, whatever it is sampled with."""
    prior = spread(PRIORS[kind](shape=(2, 3), **GIVEN["labels"]))
    codes, given = grids(prior, 9)
    with mock.patch("numpy.matmul", in_order):
        whole = WithProducts(prior, 9, precision).logits(codes, given)
        for n in (1, 2):
            some = {name: what[:n] for name, what in given.items()}
            found = WithProducts(prior, n, precision).logits(codes[:n], some)
            assert torch.equal(found.view(torch.int32), whole[:n].view(torch.int32))


def check_public(device: str) -> None:
    """Micro-batches of any size, without padding; steps packed for one sample more serve as well."""
    assert device == "cpu"
    prior = spread(snail(num_classes=3, shape=(2, 3)))
    stand_in = StandIn()
    for name in ("PLAN_LAYOUT", "draw", "make_grid_plan", "make_product", "elementwise", "checksum"):
        setattr(stand_in, name, getattr(_engine.require(), name))
    with (
        mock.patch.object(_engine, "require", return_value=stand_in),
        mock.patch.object(cuda, "why_no_cuda", return_value=None),
        mock.patch.object(cuda_grid, "why_no_cuda", return_value=None),
    ):
        label = torch.arange(5) % 3
        plan, described = compile_plan(prior), describe(prior, 5)
        assert (described.engine, described.micro_batch) == ("cuda", 5)
        assert "a row is 3 launches for what it knows beforehand and one that fills it" in str(described)
        assert described.cache_bytes == product_bytes(plan, 5, "float32")
        assert not CudaEngine().padded(plan, EngineOptions())
        assert not CudaEngine().padded(plan, EngineOptions("bfloat16"))
        assert CudaEngine().padded(plan, EngineOptions(row_kernel="library"))
        codes = sample(prior, 5, seed=3, label=label, micro_batch=2)
        assert [fields[5] for fields in stand_in.made] == [1, 2]
        assert stand_in.order == [0, 1] * 3
        again = sample(prior, 5, seed=3, label=label, micro_batch=2)
        assert len(stand_in.made) == 2
    wanted = sample(prior, 5, seed=3, label=label, engine="naive")
    assert torch.equal(codes, again)
    require_same_codes(prior, codes, wanted, request_of(prior, 5, {"label": label}, seed=3).noise, {"label": label})


def _rows(name: str, told: str = "both", **options: Any) -> Check:
    return partial(check_rows, partial({**PRIORS, **SHAPES}[name], **GIVEN[told]), **options)


ROWS: dict[str, dict[str, Check]] = {
    "rows": {
        "strict-output": _rows("strict-output", again=True),
        "inclusive": _rows("inclusive"),
        "even": _rows("strict-even", "condition"),
        "legacy": _rows("legacy", "labels"),
        "no-layers": _rows("no-layers"),
        "pixelcnn": _rows("pixelcnn-wide", again=True),
        "pixelcnn-alone": _rows("pixelcnn-no-layers", "alone"),
        **{name: _rows(name, "labels") for name in SHAPES},
    },
}
# These are run on the CPU alone.
EMULATED: dict[str, dict[str, Check]] = {
    "grids": {
        "strict-both-2": lambda d: check_grids("one-layer", "both", 2),
        "inclusive-labels-1": lambda d: check_grids("inclusive", "labels", 1),
        "strict-output-alone-9": lambda d: check_grids("strict-output", "alone", 9),
        "pixelcnn-condition-2": lambda d: check_grids("pixelcnn-no-layers", "condition", 2),
        "filtered": lambda d: check_grids("legacy", "alone", 2, settings=Settings(0.7, top_k=4, top_p=0.9)),
    },
    "precision": {
        "pixelcnn-labels-9": lambda d: check_grids("pixelcnn-one-layer", "labels", 9),
        "bfloat16-strict-2": lambda d: check_bfloat16("strict-output", 2),
        "bfloat16-strict-9": lambda d: check_bfloat16("strict-output", 9),
        "bfloat16-pixelcnn-2": lambda d: check_bfloat16("pixelcnn-no-layers", 2),
        "bits-strict": lambda d: check_bits("strict-output"),
        "bits-pixelcnn": lambda d: check_bits("pixelcnn-no-layers"),
        "bits-bfloat16-strict": lambda d: check_bits("strict-output", "bfloat16"),
    },
    "public": {"public": check_public},
}
test_interpreted, test_on_a_gpu = checked_in_both(__file__, ROWS)


@needs_triton
@pytest.mark.parametrize(("group", "name"), names(EMULATED))
def test_with_steps(group: str, name: str) -> None:
    assert_interpreted(__file__, group, name)


# The launches of a row.


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from fastvq.kernels import front_planes, front_product, front_tail

    found: list[Launch] = []
    for module, name in (
        (front_planes, "_planes_kernel"),
        (front_product, "_product_kernel"),
        (front_tail, "_tail_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


class NotViews(TorchDispatchMode):
    """Notes operations of PyTorch that give anything but views of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(one.alias_info is None or one.alias_info.is_write for one in func._schema.returns):
            self.done.append(str(func))
        return func(*args, **(kwargs or {}))


def state_of(prior: Prior, batch: int, precision: Any = "float32", device: str = "meta") -> ProductState:
    height, width = prior.config.shape
    statics = {"background": torch.empty(1, 2, height, width, device=device)}
    return ProductState(RowProducts(compile_plan(prior), torch.device(device), precision), batch, statics)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("kind", "count"), [("strict", 3), ("inclusive", 3), ("pixelcnn-no-layers", 3), ("pixelcnn", 12)]
)
def test_a_row_is_a_few_launches(kind: str, count: int, launches: list[Launch]) -> None:
    """Nothing else is enqueued for it: no copy, no fill, and views of all rows are there from the start."""
    prior = PRIORS[kind]()
    plan, started = compile_plan(prior), []
    assert row_launches(plan) == count
    native = types.SimpleNamespace(run_row=lambda *fields: started.append(len(launches)))
    extension = types.ModuleType("counted")
    extension.make_cuda_plan = lambda *fields: native  # type: ignore[attr-defined]
    with torch.inference_mode():
        state = state_of(prior, 2, device="cpu")
        request = request_of(prior, 2, {}, seed=0)
        step = CudaStep(plan, 2, CPU, precision="float32", extension=extension)
        grid = Grid(step, state, request.noise, request.known, request.settings, make_views(step))
        grid.begin(request.start_codes())
        assert launches == []
        with NotViews() as enqueued:
            for row in range(3):
                assert grid.enqueue(row) == []
    assert enqueued.done == []
    assert started == [count, 2 * count, 3 * count]
    assert [int(launch.args[0][0]) for launch in launches] == [row for row in range(3) for _ in range(count)]


@torch.inference_mode()
@pytest.mark.parametrize("height", [1, 2, 7])
@pytest.mark.parametrize("kind", ["strict", "pixelcnn-wide", "inclusive"])
def test_views_of_all_rows(kind: str, height: int) -> None:
    """Those that each row would be given when it starts."""
    state = state_of(PRIORS[kind](shape=(height, 4)), 2, device="cpu")
    tables, scratch = PlanTables(state.plan, above=False), make_scratch(state, places=2)
    views = np.full((height, 2, len(tables.ops), 4), -7, dtype=np.int64)
    fill_all_views(views, tables, state, scratch)
    one = np.empty_like(views[0])
    for row in range(height):
        state.go_to(row)
        fill_views(one, tables, state, scratch, row)
        assert np.array_equal(views[row], one)
    # The steps of a gated PixelCNN read no rows above.
    moves = (views[0] != views[-1]).any()
    assert moves == (height > 1 and kind != "pixelcnn-wide")


def test_rows_that_cannot_be_worked_out_by_products() -> None:
    for kind, make in PRIORS.items():
        plan = compile_plan(make(**GIVEN["both"]))
        assert why_no_rows(plan) is None, kind
        work = Work.rows(plan)
        assert work.starts == {
            op.index
            for op in plan.ops
            if plan.level[op.index] >= 0 and (plan.row_terms.get(op.index) or any(dr < 0 for dr, _ in op.taps))
        }


@needs_compiler
def test_library_rows_and_why() -> None:
    plan = compile_plan(snail())
    assert why_library_rows(plan, EngineOptions(row_kernel="library")) == "asked for"
    assert why_library_rows(plan, EngineOptions()) == "it needs a GPU, the tensor is on cpu"
    schedule = CudaEngine().schedule(plan, 2, EngineOptions())
    assert schedule.reason.startswith("a row is library convolutions for what it knows beforehand (it needs a GPU, ")
    assert CudaEngine().padded(plan, EngineOptions())


def test_memory_is_what_is_allocated() -> None:
    for kind in ("strict", "pixelcnn-wide"):
        prior = PRIORS[kind](shape=(6, 8), **GIVEN["both"])
        plan, batch = compile_plan(prior), 5
        given = grids(prior, batch)[1]
        statics = static_inputs(prior, request_of(prior, batch, given, seed=0))
        state = ProductState(RowProducts(plan, CPU, "float32"), batch, statics)
        kept = [state.codes, *state.keys.values(), *state.values.values(), *make_scratch(state, places=2).values()]
        kept += [state.kernels.features, state.kernels.kept, state.kernels.values, state.kernels.partials]
        kept += [tensor for name, tensor in statics.items() if name != "background"]
        assert product_bytes(plan, batch, "float32") == sum(x.numel() * x.element_size() for x in kept)
        assert product_bytes(plan, batch, "float32") > batch * common_bytes(plan, places=2)


# Compiled.


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_kernels_fit_the_chip(
    precision: Any, capability: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a layer of 256 channels over 32 x 32 positions launches them."""
    prior = snail(shape=(32, 32), channels=256, residual_channels=256, kernel_size=5, num_codes=512)
    monkeypatch.setattr(front_weights, "hardware", lambda device: Device(capability, 132))
    state_of(prior, 16, precision).begin_row(1)
    assert [launch.kernel.__name__ for launch in launches] == ["_planes_kernel", "_product_kernel", "_tail_kernel"]
    for launch in launches:
        resources = launch.compile(capability)
        name = launch.kernel.__name__
        print(f"sm_{capability} {precision} {name}: {resources.registers} registers, {resources.stack} bytes of stack")
        assert_fits(resources, capability)
        if name == "_product_kernel":
            # Vectors of 16 bytes are copied ahead of the products, which are tensor cores'.
            assert "cp.async.cg.shared.global" in resources.ptx
            assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability] in resources.ptx


if __name__ == "__main__":
    serve({**ROWS, **EMULATED})
