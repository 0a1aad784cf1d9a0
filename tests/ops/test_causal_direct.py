"""Causal operations called directly and through the dispatcher: the same bits, and which of the two is taken when."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from helpers import random_codes, refuses, snail
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from fastvq.errors import UnavailableError
from fastvq.ops import causal_attention, causal_conv2d, code_conv2d, fused_causal_conv2d
from fastvq.ops.causal_conv import library
from fastvq.ops.dispatch import runs_directly

pytestmark = pytest.mark.usefixtures("steady")

Operation = Callable[..., Tensor]
CONV, ATTENTION = torch.ops.fastvq.causal_conv2d.default, torch.ops.fastvq.causal_attention.default


class Recorder(TorchDispatchMode):
    """Notes every operation and leaves it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block(grid: tuple[int, int], channels: int, kernel: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, context and residual of a gated convolution after a concat-ELU."""
    shapes = [(2, channels, *grid), (2 * channels, 2 * channels, kernel, kernel), (2 * channels,)]
    shapes += [(2, 2 * channels, 1, 1), (2, channels, *grid)]
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def gated(mask: str, form: str) -> Operation:
    def run(x: Tensor, weight: Tensor, bias: Tensor, context: Tensor, residual: Tensor) -> Tensor:
        options: dict[str, Any] = {"mask": mask, "form": form, "activation": "concat_elu", "gate": True}
        return fused_causal_conv2d(x, weight, bias, context=context, residual=residual, **options)

    return run


def heads(width: int, length: int = 9) -> list[Tensor]:
    return [normal(2, 2, length, w, seed=seed) for seed, w in enumerate((4, 4, width))]


CALLS: dict[str, tuple[Operation, list[Tensor]]] = {
    "gathered": (gated("strict", "rows"), block((3, 4), 6)),
    "gathered-one-row": (gated("inclusive", "rows"), block((1, 5), 6)),
    "gathered-symmetric": (gated("inclusive", "symmetric"), block((5, 2), 3, kernel=5)),
    "two-convolutions": (gated("strict", "rows"), block((24, 23), 24)),
    "pointwise": (gated("inclusive", "rows"), block((4, 3), 5, kernel=1)),
    "bfloat16": (gated("strict", "symmetric"), block((4, 5), 8, dtype=torch.bfloat16)),
    "attention-other-width": (causal_attention, heads(5)),
    "attention-dropout": (lambda *t: causal_attention(*t, dropout=0.4, seed=3), heads(4)),
}


def outcome(run: Operation, tensors: list[Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    out = run(*inputs)
    upstream = normal(*out.shape, seed=9, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("call", CALLS)
def test_both_ways_give_the_same_bits(call: str) -> None:
    run, tensors = CALLS[call]
    direct = outcome(run, tensors)
    with Recorder() as recorder:
        registered = outcome(run, tensors)
    assert {CONV, ATTENTION} & set(recorder.seen)
    for mine, theirs in zip(direct, registered, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    with torch.no_grad():
        assert torch.equal(run(*tensors), direct[0])
    with torch.inference_mode():
        assert torch.equal(run(*tensors), direct[0])


def test_both_ways_of_a_look_up_give_the_same() -> None:
    def run(table: Tensor, bias: Tensor) -> Tensor:
        return code_conv2d(random_codes(2, 4, 3), table, [(-1, 0), (-1, 1), (0, -1)], bias)

    tensors = [normal(3, 5, 4), normal(4, seed=1)]
    direct = outcome(run, tensors)
    with Recorder():
        padded = outcome(run, tensors)
    assert torch.equal(direct[0], padded[0])
    # The library adds up what one row gets in an order of its own.
    for mine, theirs in zip(direct[1:], padded[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(run(*tensors), direct[0])


def test_what_inference_keeps_serves_training() -> None:
    """Indices that depend on the geometry alone are kept from call to call."""
    library._sources.cache_clear()
    run, tensors = CALLS["gathered"]
    with torch.inference_mode():
        run(*tensors)
    assert library._sources.cache_info().currsize == 1
    assert all(grad.isfinite().all() for grad in outcome(run, tensors))
    assert library._sources.cache_info().misses == 1


@pytest.mark.parametrize("call", ["gathered", "attention-other-width"])
def test_a_gradient_under_a_mode_is_the_registered_one(call: str) -> None:
    run, tensors = CALLS[call]
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    out = run(*inputs)
    with Recorder() as recorder:
        torch.autograd.grad(out.sum(), inputs)
    names = {str(func) for func in recorder.seen if func.namespace == "fastvq"}
    operation = "causal_conv2d" if call == "gathered" else "causal_attention"
    assert names == {f"fastvq.{operation}_backward.default"}


class Named(Tensor):
    """Notes what functions it is given to."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("place", ["x", "weight", "bias"])
def test_a_subclass_meets_the_registered_operation(place: str) -> None:
    tensors = {"x": normal(1, 2, 3, 4), "weight": normal(3, 2, 3, 3, seed=1), "bias": normal(3, seed=2)}
    want = causal_conv2d(**tensors)
    tensors[place] = tensors[place].as_subclass(Named)
    Named.seen.clear()
    out = causal_conv2d(**tensors)
    assert torch.ops.fastvq.causal_conv2d in Named.seen
    assert torch.equal(out.as_subclass(Tensor), want)


def test_a_batched_call_meets_the_registered_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(3, 2, 2, 4, 5), normal(4, 2, 3, 3, seed=1)
    want = torch.stack([causal_conv2d(sample, weight) for sample in x])
    answers: list[bool] = []

    def ask(*tensors: Tensor, **options: Any) -> bool:
        answers.append(runs_directly(*tensors, **options))
        return answers[-1]

    monkeypatch.setattr("fastvq.ops.causal_conv.runs_directly", ask)
    with warnings.catch_warnings():
        # The general rule for any operation is slow, and says so.
        warnings.simplefilter("ignore")
        assert torch.equal(torch.vmap(lambda sample: causal_conv2d(sample, weight))(x), want)
    assert answers == [False]


def test_compilers_and_tracers_see_the_registered_operation() -> None:
    found: list[list[Any]] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append([node.target for node in graph.graph.nodes])
        return graph.forward

    prior = snail()
    codes = random_codes(2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(prior, fullgraph=True, backend=keep)(codes), prior(codes))
    assert torch.ops.fastvq.causal_conv2d in found[0]
    x, weight = normal(1, 2, 3, 4), normal(3, 2, 3, 3, seed=1)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda *tensors: causal_conv2d(*tensors))(x, weight)
    assert CONV in [node.target for node in graph.graph.nodes]


def situations() -> Iterator[Any]:
    plain = normal(2, 3)
    yield pytest.param([plain, torch.nn.Parameter(plain)], [None, plain], True, id="plain")
    yield pytest.param([plain.as_subclass(Named)], [], False, id="subclass")
    yield pytest.param([plain], [plain.as_subclass(Named)], False, id="optional-subclass")
    yield pytest.param([plain.to("meta")], [], False, id="meta")
    yield pytest.param([plain.to_sparse()], [], False, id="sparse")
    yield pytest.param([None], [], False, id="missing")


@pytest.mark.parametrize(("tensors", "optional", "expected"), list(situations()))
def test_what_runs_directly(tensors: list[Any], optional: list[Any], expected: bool) -> None:
    assert runs_directly(*tensors, optional=optional) is expected


def test_nothing_runs_directly_where_operations_are_watched() -> None:
    x, found = normal(2, 3), []

    def ask(tensor: Tensor) -> Tensor:
        found.append(runs_directly(x))
        return tensor

    torch.vmap(ask)(x)
    torch.func.functionalize(ask)(x)
    torch.func.grad(lambda tensor: ask(tensor).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    with Recorder():
        ask(x)
    with torch.device("cpu"):
        ask(x)
    assert found == [False] * 6
    assert runs_directly(x)


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
@pytest.mark.parametrize("length", [5, 16])
def test_gradients_of_the_librarys_attention_refuse_by_name(mask: Any, length: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in heads(4, length)]
    found = torch.autograd.grad(causal_attention(*inputs, mask=mask).square().sum(), inputs, create_graph=True)
    message = "causal_attention: the gradient cannot be differentiated again; use causal_attention_reference"
    with refuses(UnavailableError, message):
        torch.autograd.grad(found[0].square().sum(), inputs)
