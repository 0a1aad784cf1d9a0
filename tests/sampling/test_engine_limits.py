"""The choice of an engine, memory limits, weights and logits that are not finite, and options that do not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_helpers import CACHED, needs_extension, request_of, spread
from helpers import TablePrior, pixelcnn, refuses, snail
from torch import Tensor

from fastvq import _engine
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.models import Prior
from fastvq.sampling import EngineOptions, Pipeline, choose_engine, describe, sample
from fastvq.sampling import api as api_module
from fastvq.sampling.engines import cpu, fill
from fastvq.sampling.engines.cpu import CpuPlan
from fastvq.sampling.plan import Plan, compile_plan

pytestmark = pytest.mark.usefixtures("steady")

every_engine = pytest.mark.parametrize("engine", [pytest.param("torch"), pytest.param("cpu", marks=needs_extension)])


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extension was not built."""
    monkeypatch.setattr(_engine, "_load", lambda: (None, "it was blocked for this test"))


# The choice.


@needs_extension
def test_auto_takes_the_fastest() -> None:
    reason = "cuda: it computes on a GPU, the prior is on cpu; cpu is the fastest that runs here"
    assert choose_engine("auto", snail()) == ("cpu", reason)
    assert choose_engine("auto", pixelcnn())[0] == "cpu"
    assert choose_engine("torch", snail()) == ("torch", "asked for by name")


def test_auto_without_the_extension(blocked: None) -> None:
    engine, reason = choose_engine("auto", snail())
    assert engine == "torch"
    assert reason.startswith(
        "cuda: it computes on a GPU, the prior is on cpu; cpu: it was blocked for this test. Build"
    )
    assert reason.endswith("; torch is the fastest that runs here")
    with refuses(UnavailableError, "engine: 'cpu' was asked for but cannot run here: it was blocked for this test"):
        choose_engine("cpu", snail())
    prior = snail()
    assert torch.equal(sample(prior, 2, seed=1), sample(prior, 2, seed=1, engine="torch"))
    assert describe(prior).engine == "torch"


def test_only_the_naive_engine_runs_any_prior(recwarn: pytest.WarningsRecorder) -> None:
    prior = TablePrior((2, 3), 7)
    engine, reason = choose_engine("auto", prior)
    assert engine == "naive"
    unknown = "no plan is known for a TablePrior, only the naive engine runs it"
    assert reason == f"cuda: {unknown}; cpu: {unknown}; torch: {unknown}; naive is the fastest that runs here"
    for name in ("cuda", *CACHED):
        with refuses(UnavailableError, f"engine: '{name}' was asked for but cannot run here: no plan is known"):
            sample(prior, 1, engine=name)
    assert torch.equal(sample(prior, 2, seed=1), sample(prior, 2, seed=1, engine="naive"))
    assert [str(said.message) for said in recwarn] == []


def test_precisions(blocked: None) -> None:
    for engine in ("auto", "torch", "naive"):
        with refuses(
            ArgumentError, "precision: only the cuda and cpu engines have bfloat16 weights, the engine here is"
        ):
            sample(snail(), 1, engine=engine, precision="bfloat16")
    for precision in ("float16", None):
        with refuses(ArgumentError, f"precision: expected one of 'float32', 'bfloat16', got {precision!r}"):
            sample(snail(), 1, precision=precision)  # type: ignore[arg-type]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-threads": ({"threads": 0}, ArgumentError, "threads: must be at least 1, got 0"),
    "negative-threads": ({"threads": -1}, ArgumentError, "threads: must be at least 1, got -1"),
    "many-threads": ({"threads": 5000}, ArgumentError, "threads: must be at most 1024, got 5000"),
    "threads-of-text": ({"threads": "2"}, ArgumentTypeError, "threads: expected an int, got str '2'"),
    "kernels": ({"kernels": "mmx"}, ArgumentError, "kernels: expected one of 'auto', 'avx512', .*, got 'mmx'"),
    "precision": ({"precision": "float16"}, ArgumentError, "precision: expected one of .*, got 'float16'"),
    "row-kernel": (
        {"row_kernel": "cudnn"},
        ArgumentError,
        "row_kernel: expected None, for the cuda engine's own products, or 'library', got 'cudnn'",
    ),
    "triton": (
        {"row_kernel": "triton"},
        ArgumentError,
        "row_kernel: expected None, for the cuda engine's own products, or 'library', got 'triton'",
    ),
    "no-tile": ({"tile": 0}, ArgumentError, "tile: must be at least 1, got 0"),
    "graph": ({"cuda_graph": 1}, ArgumentTypeError, "cuda_graph: expected a bool, got int"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with refuses(error, message):
        EngineOptions(**options)


UNKNOWN_OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bfloat16-torch": ("torch", {"precision": "bfloat16"}, "precision: only the cuda and cpu engines have bfloat16"),
    "bfloat16-naive": ("naive", {"precision": "bfloat16"}, "precision: only the cuda and cpu engines have bfloat16"),
    "library-naive": (
        "naive",
        {"row_kernel": "library"},
        "row_kernel: only the cuda engine has a choice, the engine here",
    ),
    "library-torch": (
        "torch",
        {"row_kernel": "library"},
        "row_kernel: only the cuda engine has a choice, the engine here",
    ),
    "library-cpu": ("cpu", {"row_kernel": "library"}, "row_kernel: only the cuda engine has a choice, the engine here"),
    "tile-naive": ("naive", {"tile": 2}, "tile: the naive engine does not sample along a front, got 2"),
    "graph-cpu": ("cpu", {"cuda_graph": True}, "cuda_graph: only the cuda engine has one, the engine here is 'cpu'"),
}


@pytest.mark.parametrize(("engine", "options", "message"), UNKNOWN_OPTIONS.values(), ids=UNKNOWN_OPTIONS)
def test_options_that_an_engine_does_not_have(engine: str, options: dict[str, Any], message: str) -> None:
    prior, rows = snail(), []
    with refuses(ArgumentError, message):
        fill(
            engine,
            prior,
            request_of(prior, 1, {}, seed=0),
            lambda count, _: rows.append(count),
            EngineOptions(**options),
        )
    assert rows == []


def test_sampling_with_options() -> None:
    prior, pipeline = snail(), Pipeline.from_pretrained("digits")
    wanted = sample(prior, 3, seed=1, engine="torch")
    assert torch.equal(sample(prior, 3, seed=1, engine="torch", options=EngineOptions()), wanted)
    wanted = pipeline.sample(2, label=1, seed=1, engine="torch").codes
    drawn = pipeline.sample(2, label=1, seed=1, engine="torch", options=EngineOptions()).codes
    assert all(torch.equal(*pair) for pair in zip(drawn, wanted, strict=True))
    graph = EngineOptions(cuda_graph=True)
    for draw in (functools.partial(sample, prior), pipeline.sample):
        with refuses(ArgumentError, "cuda_graph: only the cuda engine has one"):
            draw(1, engine="torch", options=graph)
        with refuses(ArgumentTypeError, "options: expected EngineOptions or None, got dict"):
            draw(1, options={"threads": 1})
        with refuses(ArgumentError, "precision: got 'bfloat16', but options say 'float32'"):
            draw(1, precision="bfloat16", options=graph)


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
def test_options_reach_the_engine(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    filling = CpuPlan.fill

    def spy(plan: Plan, **settings: Any) -> CpuPlan:
        made.append(settings)
        return CpuPlan(plan, **settings)

    def counted(self: CpuPlan, *rest: Any, **settings: Any) -> Tensor:
        made.append({"threads": settings["threads"], "tile": rest[2].tile})
        return filling(self, *rest, **settings)

    monkeypatch.setattr(cpu, "CpuPlan", spy)
    monkeypatch.setattr(CpuPlan, "fill", counted)
    options = EngineOptions("bfloat16", threads, "baseline", tile=2)
    sample(snail(attention=False), 1, seed=0, engine="cpu", options=options)
    assert made == [{"kernels": "baseline", "bf16": True}, {"threads": threads, "tile": 2}]


@needs_extension
def test_what_the_extension_refuses_is_an_argument() -> None:
    prior = snail()
    with refuses(ArgumentError, "kernels: expected auto"):
        CpuPlan(compile_plan(prior), kernels="mmx")


# Memory.


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the micro-batches that were filled."""
    sizes: list[int] = []

    def counted(engine: str, prior: Prior, request: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(request.noise))
        return fill(engine, prior, request, *rest, **named)

    monkeypatch.setattr(api_module, "fill", counted)
    return sizes


@every_engine
@pytest.mark.parametrize("fits", [1, 3, 7, 8, 100])
def test_a_memory_limit_lowers_the_micro_batch(engine: str, fits: int, batches: list[int]) -> None:
    prior = spread(snail())
    limit = describe(prior, engine=engine).memory(fits)
    codes = sample(prior, 9, seed=1, engine=engine, memory_limit=limit)
    sizes = {1: [1] * 9, 3: [3] * 3, 7: [4, 5], 8: [4, 5], 100: [9]}[fits]
    assert batches == sizes
    assert torch.equal(codes, sample(prior, 9, seed=1, engine=engine, micro_batch=fits))
    batches.clear()
    sample(prior, 9, seed=1, engine=engine, memory_limit=describe(prior, engine=engine).memory(fits + 1) - 1)
    assert batches == sizes


@every_engine
@pytest.mark.parametrize(("fits", "sizes"), [(1, [1] * 9), (3, [3] * 3), (8, [4, 5])], ids=["one", "three", "eight"])
def test_without_a_limit_caches_that_are_too_large_lower_it_too(
    engine: str, fits: int, sizes: list[int], batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = spread(snail())
    caches = describe(prior, fits, engine=engine, micro_batch=fits).cache_bytes
    monkeypatch.setattr("fastvq.sampling.micro_batch.DEFAULT_MEMORY", caches)
    sample(prior, 9, seed=1, engine=engine)
    assert batches == sizes


@every_engine
def test_a_micro_batch_asked_for_is_kept(engine: str, batches: list[int]) -> None:
    prior = snail()
    sample(prior, 9, engine=engine, micro_batch=5, memory_limit=describe(prior, engine=engine).memory(5))
    assert batches == [4, 5]


def test_memory_limits_too_small() -> None:
    prior = snail()
    needed = describe(prior, engine="torch").memory(1)
    with refuses(ArgumentError, f"memory_limit: a micro-batch of 1 needs {needed} bytes, got {needed - 1}"):
        sample(prior, 1, engine="torch", memory_limit=needed - 1)
    needed = describe(prior, engine="torch").memory(5)
    with refuses(ArgumentError, f"memory_limit: a micro-batch of 5 needs {needed} bytes, got {needed - 1}"):
        sample(prior, 1, engine="torch", micro_batch=5, memory_limit=needed - 1)
    with refuses(ArgumentError, "memory_limit: must be at least 1, got 0"):
        sample(prior, 1, engine="torch", memory_limit=0)
    with refuses(ArgumentError, "memory_limit: the naive engine cannot keep to one"):
        sample(prior, 1, engine="naive", memory_limit=2**40)
    with refuses(ArgumentError, "memory_limit: the naive engine cannot keep to one"):
        sample(TablePrior((2, 3), 7), 1, memory_limit=2**40)


def test_a_pipeline_keeps_all_levels_to_the_limit() -> None:
    pipeline = Pipeline.from_pretrained("digits")
    limit = max(describe(prior, engine="torch").memory(3) for prior in pipeline.priors)
    drawn = pipeline.sample(4, label=1, seed=1, memory_limit=limit, engine="torch")
    assert drawn.micro_batch == 3
    again = pipeline.sample(4, label=1, seed=1, micro_batch=3, engine="torch")
    assert torch.equal(drawn.images, again.images)


# Weights and logits that are not finite.

NOT_FINITE: dict[str, Callable[[Any, float], object]] = {
    "table": lambda p, x: p.input.weight[0, 1].fill_(x),
    "tap-above": lambda p, x: p.blocks[0].layers[0].conv1.weight[0, 0, 0, 0].fill_(x),
    "tap-on-the-row": lambda p, x: p.blocks[0].layers[0].conv1.weight[0, 0, 2, 0].fill_(x),
    "pointwise": lambda p, x: p.blocks[0].attention.key.weight[0].fill_(x),
    "output": lambda p, x: p.output.weight[1].fill_(x),
    "bias": lambda p, x: p.blocks[0].layers[0].conv2.bias[0].fill_(x),
}


@every_engine
@pytest.mark.parametrize("place", NOT_FINITE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(engine: str, place: str, value: float) -> None:
    prior = snail()
    with torch.no_grad():
        NOT_FINITE[place](prior, value)
    rows = []
    with refuses(ArgumentError, "prior: its weights hold NaN or infinite values"):
        fill(engine, prior, request_of(prior, 2, {}, seed=0), lambda count, _: rows.append(count))
    assert rows == []


@every_engine
def test_weights_behind_the_mask_may_be_anything(engine: str) -> None:
    prior: Any = spread(snail())
    wanted = sample(prior, 4, seed=1, engine=engine)
    with torch.no_grad():
        prior.blocks[0].layers[0].conv1.weight[:, :, 2, 1:].fill_(float("nan"))
    assert torch.equal(sample(prior, 4, seed=1, engine=engine), wanted)


@every_engine
@pytest.mark.parametrize("kind", [snail, pixelcnn])
def test_logits_that_overflow(engine: str, kind: Callable[..., Any]) -> None:
    """Found at the first position, not drawn from; a layer that maps NaN to 0 must not hide it either."""
    prior = spread(kind())
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(1e25)
    message = {"cpu": "prior: its logits are not finite for sample 0 of the micro-batch at row 0", "torch": "logits: "}
    for threads in (1, 2):
        with refuses(ArgumentError, message[engine]):
            fill(
                engine,
                prior,
                request_of(prior, 2, {}, seed=0),
                lambda *_: None,
                EngineOptions(threads=threads),
            )


@every_engine
def test_logits_that_overflow_late(engine: str) -> None:
    """Only the code 3 leads to infinity, and only sample 1 draws it, in the second row."""
    prior: Any = pixelcnn(layers=0)
    with torch.no_grad():
        prior.input_horizontal.weight[:, 3].fill_(1e38)
        prior.input_merge.weight.fill_(1e38)
        prior.hidden.weight.fill_(1e38)
    init = torch.zeros(2, 3, 4, dtype=torch.int64)
    init[1, 1, 1] = 3
    known = torch.zeros(3, 4, dtype=torch.bool)
    known[:2] = True
    known[1, 2] = False
    where = "prior: its logits are not finite for sample [01] of the micro-batch at row 1, column 2"
    with refuses(ArgumentError, where if engine == "cpu" else "logits: "):
        sample(prior, 2, seed=1, engine=engine, init_codes=init, mask=known)


@every_engine
def test_sampling_goes_on_after_an_error(engine: str) -> None:
    prior: Any = spread(snail())
    wanted = sample(prior, 4, seed=1, engine=engine)
    with torch.no_grad():
        prior.output.weight.fill_(3e38)
    with refuses(ArgumentError, "prior: its logits are not finite|logits: "):
        sample(prior, 4, seed=1, engine=engine)
    with torch.no_grad():
        prior.output.weight.copy_(spread(snail()).output.weight)
    assert torch.equal(sample(prior, 4, seed=1, engine=engine), wanted)


@every_engine
def test_rows_are_counted(engine: str) -> None:
    prior = snail()
    rows: list[int] = []
    fill(engine, prior, request_of(prior, 2, {}, seed=0), lambda count, _: rows.append(count))
    assert sum(rows) == 3


@every_engine
def test_progress(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample(snail(), 9, seed=1, progress=True, micro_batch=4, engine=engine)
    assert "9/9" in capsys.readouterr().err
