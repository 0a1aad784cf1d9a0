"""The Python side of the CUDA engine: choice, options, rows in flight, the public calls, graphs.

Without a GPU no kernels run: the C++ engine takes their place behind the same interface.
"""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cuda_stand_in import BATCH, CPU, Job, StandIn
from engine_helpers import (
    engine_logits,
    given_to,
    grids,
    needs_extension,
    request_of,
    require_same_codes,
    rounded,
    spread,
)
from helpers import pixelcnn, refuses, snail
from plan_priors import GIVEN, PRIORS, every_given, every_prior
from torch import Tensor
from triton_helpers import needs_gpu

from fastvq import _engine
from fastvq.cli.describe import info
from fastvq.cli.parser import build_parser
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.models import Prior
from fastvq.ops.draw import draw
from fastvq.sampling import (
    EngineOptions,
    Pipeline,
    choose_engine,
    describe,
    sample,
    uniforms,
)
from fastvq.sampling.engines import cuda, cuda_grid, fill, static_inputs, why_not
from fastvq.sampling.engines.cuda import cuda_summary
from fastvq.sampling.engines.cuda_graph import GraphedGrid
from fastvq.sampling.engines.cuda_grid import ROWS_IN_FLIGHT, CudaStep, why_no_cuda
from fastvq.sampling.engines.cuda_rows import ProductState, RowProducts
from fastvq.sampling.engines.state import CompiledPlan, GridState, RowState, cache_bytes, padded
from fastvq.sampling.engines.step_tables import make_scratch
from fastvq.sampling.plan import compile_plan
from fastvq.sampling.request import Settings

pytestmark = pytest.mark.usefixtures("steady")


# The choice.


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """An extension that says it was built with CUDA for one device, and a PyTorch that says the same."""
    info = {"compiled": "13.0", "architectures": "80 90a 100 + PTX", "device_count": 1, "error": None}
    found = types.SimpleNamespace(CUDA=True, cuda_info=lambda: dict(info), info=info)
    monkeypatch.setattr(_engine, "_load", lambda: (found, None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return found


def test_a_gpu_and_an_extension_with_cuda(extension: types.SimpleNamespace) -> None:
    assert why_no_cuda(torch.device("cuda:0")) is None
    assert cuda_summary() == "13.0 for 80 90a 100 + PTX; 1 device(s)"


REFUSED: dict[str, tuple[Callable[[types.SimpleNamespace, pytest.MonkeyPatch], object], str]] = {
    "old-extension": (lambda e, m: delattr(e, "CUDA"), "the compiled extension was built without CUDA"),
    "without-cuda": (lambda e, m: setattr(e, "CUDA", False), "the compiled extension was built without CUDA"),
    "no-extension": (lambda e, m: m.setattr(_engine, "_load", lambda: (None, "it is missing")), "it is missing. Build"),
    "no-driver": (lambda e, m: e.info.update(error="no driver"), r"CUDA does not work in the extension \(no driver\)"),
    "another-pytorch": (lambda e, m: m.setattr(torch.version, "cuda", None), "this PyTorch was built without CUDA"),
    "no-such-device": (lambda e, m: e.info.update(device_count=0), "there is no GPU 0"),
    "not-in-pytorch": (lambda e, m: m.setattr(torch.cuda, "device_count", lambda: 0), "there is no GPU 0"),
    "too-old": (
        lambda e, m: m.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5)),
        "it needs compute capability 8.0 or higher, cuda:0 has 7.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_reasons(case: str, extension: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = REFUSED[case]
    change(extension, monkeypatch)
    device = torch.device("cuda:0")
    assert str(why_no_cuda(device)).startswith(reason.replace("\\", ""))
    with refuses(UnavailableError, f"engine: 'cuda' was asked for but cannot run here: {reason}"):
        CudaStep(compile_plan(snail()), 1, device, precision="float32")
    if case != "another-pytorch":
        expected = "not in the extension" if "extension" in case or "without" in case else None
        assert expected is None or cuda_summary() == expected


def test_a_prior_on_the_cpu() -> None:
    prior = snail()
    reason = "it computes on a GPU, the prior is on cpu"
    assert why_not("cuda", prior) == reason
    message = f"engine: 'cuda' was asked for but cannot run here: {reason}"
    for call in (
        lambda: choose_engine("cuda", prior),
        lambda: sample(prior, 1, engine="cuda"),
        lambda: fill("cuda", prior, request_of(prior, 1, {}, seed=0), lambda *_: None),
        lambda: fill("cuda", prior, request_of(prior, 1, {}, seed=0), lambda *_: None, EngineOptions(cuda_graph=True)),
    ):
        with refuses(UnavailableError, message):
            call()


@needs_extension
def test_step_options() -> None:
    plan = compile_plan(snail())
    for precision in ("float16", None):
        with refuses(ArgumentError, "precision: expected one of 'float32', 'bfloat16', got"):
            CudaStep(plan, 1, CPU, precision=precision, extension=StandIn())  # type: ignore[arg-type]
    extension = StandIn()
    CudaStep(plan, 2, CPU, precision="float32", extension=extension)
    CudaStep(plan, 9, CPU, precision="bfloat16", blocks=5, shared_limit=4096, extension=extension)
    first, second = (made[4:] for made in extension.made)
    height, width = plan.shape
    shape = (width, height * width, plan.num_codes, padded(height * width))
    assert first == (plan.output, 2, *shape, False, 0, 0, 0)
    assert second == (plan.output, 9, *shape, True, 0, 5, 4096)
    with refuses(ArgumentError, "shape: expected positive sizes"):
        CudaStep(plan, 0, CPU, precision="float32", extension=StandIn())
    with torch.no_grad():
        prior: Any = snail()
        prior.output.weight[0].fill_(float("nan"))
    with refuses(ArgumentError, "prior: its weights hold NaN or infinite values"):
        CudaStep(compile_plan(prior), 1, CPU, precision="float32", extension=StandIn())


# A whole grid.


@needs_extension
@every_prior
@every_given
def test_codes(kind: str, told: str) -> None:
    """Logits are those of the torch engine, with steps' weights rounded for bfloat16, and codes are drawn from them."""
    prior = spread(PRIORS[kind](**GIVEN[told]))
    plan = compile_plan(prior)
    for precision in ("float32", "bfloat16"):
        job = Job(prior, precision=precision)
        logits = torch.full((*job.request.init_codes.shape, plan.num_codes), float("nan"))
        codes = job.run(logits=logits)
        of = plan if precision == "float32" else rounded(plan, above=False)
        wanted = engine_logits("torch", prior, codes, job.given, plan=of)
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert torch.equal(draw(logits, job.request.noise), codes)
        assert not (torch.equal(codes, job.request.init_codes) and prior.config.num_codes > 1)


@needs_extension
@torch.no_grad()
def test_known_codes_stay_and_logits_come_back() -> None:
    prior = spread(snail(shape=(4, 5), num_codes=7))
    codes, given = grids(prior, BATCH)
    mask = torch.rand(BATCH, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    job = Job(prior, init_codes=codes, mask=mask)
    logits = torch.full((BATCH, 4, 5, 7), float("nan"))
    found = job.run(logits=logits)
    assert torch.equal(found[mask], codes[mask])
    assert logits.isfinite().all()
    wanted = prior(found, **given).movedim(1, -1)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    noise = uniforms(4, 0, BATCH, (4, 5))
    naive = sample(prior, BATCH, engine="naive", seed=4, init_codes=codes, mask=mask)
    require_same_codes(prior, found, naive, noise, given, known=mask)


@needs_extension
@pytest.mark.parametrize("height", [1, 2, ROWS_IN_FLIGHT, ROWS_IN_FLIGHT + 1, 9])
def test_rows_in_flight(height: int) -> None:
    """Rows are enqueued ahead, but never more than there are places for; every row is counted when it is done."""
    job = Job(spread(snail(shape=(height, 2))))
    events: list[tuple[str, int]] = []
    job.extension.when_row = lambda row: events.append(("enqueued", row))
    done = iter(range(height))
    job.run(lambda rows, codes: events.extend(("done", next(done)) for _ in range(rows)))
    assert [row for what, row in events if what == "enqueued"] == list(range(height))
    assert [row for what, row in events if what == "done"] == list(range(height))
    ahead = 0
    for what, row in events:
        started = row + 1 if what == "enqueued" else None
        finished = sum(w == "done" for w, _ in events[: events.index((what, row))])
        ahead = max(ahead, (started or 0) - finished)
        if what == "done":
            assert events.index(("enqueued", row)) < events.index(("done", row))
    assert ahead == min(height, ROWS_IN_FLIGHT)


@needs_extension
def test_an_exception_leaves_the_step_usable() -> None:
    job = Job(spread(snail()))
    wanted = job.run().clone()

    def stop(rows: int, codes: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(stop)
    again = Job(spread(snail()))
    again.step = job.step
    assert torch.equal(again.run(), wanted)


@needs_extension
def test_logits_that_are_not_finite() -> None:
    """Only the code 3 leads to infinity, and only sample 1 has it, in the second row; rows go on to the end."""
    with torch.no_grad():
        prior: Any = pixelcnn(layers=0)
        prior.input_horizontal.weight[:, 3].fill_(1e38)  # opens all 16 gates, whose sum is infinite then
        prior.input_merge.weight.fill_(2.4e37)
        prior.hidden.weight.fill_(1e-3)
    init = torch.zeros(2, 3, 4, dtype=torch.int64)
    init[1, 1, 1] = 3
    known = torch.zeros(3, 4, dtype=torch.bool)
    known[:2] = True
    known[1, 2] = False
    job = Job(prior, 2, init_codes=init, mask=known)
    rows: list[int] = []
    message = "prior: its logits are not finite for sample 1 of the micro-batch at row 1, column 2$"
    with refuses(ArgumentError, message):
        job.run(lambda count, _: rows.append(count))
    assert sum(rows) == 3
    with refuses(ArgumentError, message):
        fill("cpu", prior, job.request, lambda *_: None)


# The public calls.


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in as if it were an extension with CUDA, and priors on the CPU as if that were a GPU."""
    stand_in = StandIn()
    for name in ("PLAN_LAYOUT", "draw", "make_grid_plan", "make_product", "elementwise", "checksum"):
        setattr(stand_in, name, getattr(_engine.require(), name))
    monkeypatch.setattr(_engine, "require", lambda: stand_in)
    for module in (cuda, cuda_grid):
        monkeypatch.setattr(module, "why_no_cuda", lambda device: None)
    return stand_in


def require_drawn(prior: Prior, codes: Tensor, given: dict[str, Any], precision: str) -> None:
    """Codes are drawn, with seed 2, from the logits of the torch engine with the weights of steps rounded likewise."""
    plan = compile_plan(prior)
    of = plan if precision == "float32" else rounded(plan, above=False)
    logits = engine_logits("torch", prior, codes, given, plan=of)
    assert torch.equal(draw(logits, uniforms(2, 0, len(codes), prior.config.shape)), codes)


@needs_extension
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sample(precision: Any, on_cpu: StandIn) -> None:
    prior = spread(snail(num_classes=3, condition_shapes=((3, 2),), condition_num_codes=(4,)))
    assert choose_engine("auto", prior, precision) == ("cuda", "cuda is the fastest that runs here")
    given = given_to(prior, 5)
    chosen: dict[str, Any] = {"seed": 2, "micro_batch": 2, "precision": precision, **given}
    codes = sample(prior, 5, **chosen)
    assert len(on_cpu.made) == 1
    assert on_cpu.order == [0, 1, 2] * 3
    require_drawn(prior, codes, given, precision)
    assert torch.equal(codes, sample(prior, 5, engine="cuda", **chosen))
    assert len(on_cpu.made) == 1
    with torch.no_grad():
        prior.get_submodule("output").bias.add_(torch.linspace(0, 3, 5))  # type: ignore[operator]
    changed = sample(prior, 5, **chosen)
    assert len(on_cpu.made) == 2
    assert not torch.equal(changed, codes)
    require_drawn(prior, changed, given, precision)


@needs_extension
def test_a_pipeline(on_cpu: StandIn) -> None:
    pipeline = Pipeline.from_pretrained("digits")
    drawn = pipeline.sample(3, label=1, seed=1)
    assert len(on_cpu.made) == 2
    wanted = pipeline.sample(3, label=1, seed=1, engine="cpu")
    assert all(torch.equal(*pair) for pair in zip(drawn.codes, wanted.codes, strict=True))


@needs_extension
def test_explain_counts_two_places(on_cpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = snail()
    described = describe(prior)
    assert described.engine == "cuda"
    monkeypatch.undo()
    scratch = make_scratch(Job(prior, 1).state, places=1)
    one_place = cache_bytes(compile_plan(prior), places=1)
    assert described.cache_bytes - one_place == sum(4 * place.numel() for place in scratch.values())


@needs_extension
def test_grids_of_one_step_take_turns() -> None:
    prior = spread(snail(shape=(6, 5), layers_per_block=2))
    jobs = [Job(prior, seed=seed) for seed in range(4)]
    wanted = [job.run().clone() for job in jobs]
    together = [Job(prior, seed=seed) for seed in range(4)]
    module = together[0].extension
    for job in together:
        job.step = together[0].step

    def work(job: Job) -> Tensor:
        torch.set_num_threads(1)
        return job.run()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, together))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert module.order == [*range(6)] * 4


def test_info_says_what_the_extension_was_built_for(
    capsys: pytest.CaptureFixture[str], extension: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension.info["error"] = "no driver"
    extension.__file__, extension.build_info = "_ext.so", lambda: {"compiler": "GCC 99", "instruction_sets": ["avx"]}
    gpus = [types.SimpleNamespace(name=f"GPU {i}", major=9, minor=0, total_memory=80e9) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    info(build_parser().parse_args(["info", "--device", "cpu"]))
    lines = capsys.readouterr().out.splitlines()
    assert "cuda        13.0 for 80 90a 100 + PTX; no driver" in lines
    assert "extension   available, built by GCC 99; this processor has avx" in lines
    assert any(line.endswith(" threads), GPU 0 (9.0, 80 GB), GPU 1 (9.0, 80 GB)") for line in lines)
    assert "engines     cpu, torch, naive (on cpu)" in lines


# Graphs.


@needs_extension
def test_graphs_need_a_gpu() -> None:
    prior = spread(snail(num_classes=3))
    job = Job(prior)
    with refuses(UnavailableError, "cuda_graph: it needs a GPU, the plan is on cpu"):
        GraphedGrid(job.step, job.state, job.request)


def test_keys_of_graphs() -> None:
    prior = spread(snail(num_classes=3))
    key = GraphedGrid.key

    def of(n: int, **changes: Any) -> object:
        request = request_of(prior, n, given_to(prior, n), **{"seed": 0, **changes})
        return key(static_inputs(prior, request), request)

    assert of(2) == of(2, seed=1)
    assert of(2) != of(3)
    assert of(2) != of(2, settings=Settings(top_k=2))
    assert of(2, settings=Settings(top_k=2)) == of(2, settings=Settings(top_k=2))


# On a GPU.


@needs_gpu
@torch.inference_mode()
@every_prior
@every_given
def test_the_row_phase_never_waits_for_the_gpu(kind: str, told: str) -> None:
    prior = spread(PRIORS[kind](**GIVEN[told])).cuda()
    request = request_of(prior, BATCH, given_to(prior, BATCH), seed=4)
    plan, device = compile_plan(prior), torch.device("cuda")
    statics = static_inputs(prior, request)
    for mode, kind in itertools.product(("default", "error"), ("library", "products")):
        # Libraries and kernels may wait when they are first called.
        state: RowState
        if kind == "library":
            state = GridState(CompiledPlan(plan, device), BATCH, statics)
        else:
            state = ProductState(RowProducts(plan, device, "float32"), BATCH, statics)
        state.begin(request.start_codes())
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for row in range(prior.config.shape[0]):
                state.begin_row(row)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def gpu_codes(prior: Prior, **options: Any) -> Tensor:
    if (reason := why_not("cuda", prior)) is not None:
        pytest.skip(reason)
    request = request_of(prior, BATCH, given_to(prior, BATCH), seed=4)
    return fill("cuda", prior, request, lambda *_: None, EngineOptions(**options)).cpu()


@needs_gpu
@every_prior
@every_given
@pytest.mark.parametrize(
    "options",
    [{}, {"row_kernel": "library"}, {"cuda_graph": True}, {"row_kernel": "library", "cuda_graph": True}],
    ids=["plain", "library", "graph", "library-graph"],
)
def test_codes_on_a_gpu(options: dict[str, Any], kind: str, told: str) -> None:
    prior = spread(PRIORS[kind](**GIVEN[told]))
    given = given_to(prior, BATCH)
    wanted = sample(prior, BATCH, seed=4, engine="naive", **given)
    noise = uniforms(4, 0, BATCH, prior.config.shape)
    on_gpu = copy.deepcopy(prior).cuda()
    for _ in range(2):  # a graph is recorded and then replayed
        found = gpu_codes(on_gpu, **options)
        require_same_codes(prior, found, wanted, noise, given)


@needs_gpu
def test_a_graph_is_replayed_for_other_requests() -> None:
    prior = spread(snail(shape=(5, 6), num_classes=3)).cuda()
    if (reason := why_not("cuda", prior)) is not None:
        pytest.skip(reason)
    for seed in range(3):
        request = request_of(prior, BATCH, {"label": (torch.arange(BATCH) + seed) % 3}, seed=seed)
        plain = fill("cuda", prior, request, lambda *_: None)
        replayed = fill("cuda", prior, request, lambda *_: None, EngineOptions(cuda_graph=True))
        assert torch.equal(plain, replayed)
