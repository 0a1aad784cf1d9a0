"""Causal convolution and attention as registered operations: fused forms, gradients, compilers, types, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import refuses, snail
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode
from triton_helpers import needs_gpu

from fastvq._precision import full_float32
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.models.blocks import CausalConv2d, GatedBlock, pointwise
from fastvq.models.blocks import _step as block_step
from fastvq.ops import (
    causal_attention,
    causal_attention_reference,
    causal_conv2d,
    causal_conv2d_reference,
    explain_backend,
    fused_causal_conv2d,
    fused_causal_conv2d_reference,
)
from fastvq.ops.causal_attention import blocks
from fastvq.ops.causal_conv import backends as causal_backends
from fastvq.ops.causal_conv import library
from fastvq.ops.causal_conv.library import channels_last
from fastvq.ops.causal_conv.reference import activate
from fastvq.ops.dispatch import why_no_triton
from fastvq.ops.grid import FORMS, MASKS, Form, Mask

pytestmark = pytest.mark.usefixtures("steady")

NAN = math.nan
each_mask = pytest.mark.parametrize("mask", MASKS)
each_form = pytest.mark.parametrize("form", FORMS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs, normal(*out.shape, seed=9).to(out.dtype), materialize_grads=True))


def block_arguments(
    activation: str | None, context: str, gate: bool, residual: bool, kernel: int = 3, grid: tuple[int, int] = (4, 5)
) -> dict[str, Tensor]:
    """float64 tensors of a fused convolution from 3 to 6 channels."""
    inputs = 6 if activation == "concat_elu" else 3
    found = {"x": normal(2, 3, *grid), "weight": normal(6, inputs, kernel, kernel, seed=1), "bias": normal(6, seed=2)}
    if context != "none":
        found["context"] = normal(2, 6, *((1, 1) if context == "uniform" else grid), seed=3)
    if residual:
        found["residual"] = normal(2, 3 if gate else 6, *grid, seed=4)
    return found


@each_form
@each_mask
@pytest.mark.parametrize("activation", [None, "elu", "concat_elu"])
@pytest.mark.parametrize("context", ["none", "uniform", "everywhere"])
@pytest.mark.parametrize(("gate", "residual"), list(itertools.product([False, True], repeat=2)))
def test_fused_convolution_equals_its_steps(
    activation: Any, context: str, gate: bool, residual: bool, mask: Mask, form: Form
) -> None:
    tensors = block_arguments(activation, context, gate, residual)
    options = {"mask": mask, "form": form, "activation": activation, "gate": gate}
    mine, theirs = (dict(zip(tensors, leaves(*tensors.values()), strict=True)) for _ in range(2))
    out, want = fused_causal_conv2d(**mine, **options), fused_causal_conv2d_reference(**theirs, **options)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(fused_causal_conv2d(**tensors, **options), out)
    found, expected = gradients(out, list(mine.values())), gradients(want, list(theirs.values()))
    for name, grad, right in zip(tensors, found, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (2, 2)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("kernel", [1, 2, 5, 6])
@each_form
@each_mask
def test_fused_convolution_on_narrow_grids(kernel: int, mask: Mask, form: Form, grid: tuple[int, int]) -> None:
    tensors = block_arguments("concat_elu", "uniform", True, True, kernel, grid)
    mine, theirs = leaves(*tensors.values()), leaves(*tensors.values())
    options = {"mask": mask, "form": form, "activation": "concat_elu", "gate": True}
    out = fused_causal_conv2d(**dict(zip(tensors, mine, strict=True)), **options)
    want = fused_causal_conv2d_reference(**dict(zip(tensors, theirs, strict=True)), **options)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for grad, right in zip(gradients(out, mine), gradients(want, theirs), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", [("x",), ("weight",), ("bias",), ("context",), ("residual",), ("x", "bias")], ids=str)
def test_only_some_inputs_need_a_gradient(names: tuple[str, ...]) -> None:
    tensors = block_arguments("elu", "uniform", True, True)
    for name in names:
        tensors[name].requires_grad_()
    wanted = [tensors[name] for name in names]
    out = fused_causal_conv2d(**tensors, activation="elu", gate=True)
    want = fused_causal_conv2d_reference(**tensors, activation="elu", gate=True)
    for grad, right in zip(gradients(out, wanted), gradients(want, wanted), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 1])
def test_fused_convolution_of_small_batches(batch: int) -> None:
    tensors = block_arguments("elu", "uniform", True, True)
    few = {n: t if n in ("weight", "bias") else t[:batch] for n, t in tensors.items()}
    given = dict(zip(few, leaves(*few.values()), strict=True))
    out = fused_causal_conv2d(**given, activation="elu", gate=True)
    assert torch.equal(out, fused_causal_conv2d(**tensors, activation="elu", gate=True)[:batch])
    found = dict(zip(given, gradients(out, list(given.values())), strict=True))
    assert all(grad.shape == given[name].shape for name, grad in found.items())
    assert (found["weight"] != 0).any() == (batch > 0)


@pytest.mark.parametrize("channels", [1, 3, 64])
def test_memory_of_any_layout_gives_the_same(channels: int) -> None:
    x, weight = normal(3, 9, channels, 8).permute(0, 2, 1, 3), normal(4, channels, 3, 3, seed=1)
    want = causal_conv2d_reference(x, weight)
    for given in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        out = causal_conv2d(given, weight)
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        assert out.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 1, 5, 7), (3, 64, 16, 9), (0, 3, 2, 2), (2, 80, 64, 1)], ids=str)
def test_channels_last(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    found = channels_last(x)
    assert torch.equal(found, x)
    assert found.permute(0, 2, 3, 1).is_contiguous()


@each_form
@each_mask
def test_nothing_leaks_through_a_fused_convolution(mask: Mask, form: Form) -> None:
    tensors = block_arguments("concat_elu", "uniform", True, True)
    options = {"mask": mask, "form": form, "activation": "concat_elu", "gate": True}
    clean = fused_causal_conv2d(**tensors, **options).flatten(2)
    read = torch.zeros(3, 3, dtype=torch.bool)
    read.view(-1)[: (6 if form == "rows" else 3) + 1 + (mask == "inclusive")] = True
    tensors["weight"][:, :, ~read] = NAN
    for position in range(20):
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        given["x"].flatten(2)[:, :, position:] = NAN
        given = {name: tensor.requires_grad_() for name, tensor in given.items()}
        out = fused_causal_conv2d(**given, **options).flatten(2)
        free = position + (mask == "strict")
        assert torch.equal(out[:, :, :free], clean[:, :, :free])
        assert out[:, :, free:].isnan().any() == (free < 20)
        # A gate's own derivative at a later position would be NaN.
        plain = fused_causal_conv2d(given["x"], given["weight"], mask=mask, form=form, activation="concat_elu")
        upstream = normal(*plain.flatten(2).shape, seed=7)
        upstream[:, :, free:] = 0
        (grad,) = torch.autograd.grad(plain.flatten(2), given["x"], upstream)
        assert grad.flatten(2)[:, :, :position].isfinite().all()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@each_form
@each_mask
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_those_of_a_dense_convolution(dtype: torch.dtype, mask: Mask, form: Form) -> None:
    x, weight = normal(2, 32, 12, 13).to(dtype), (normal(24, 32, 5, 5, seed=1) / 16).to(dtype)
    above = 4 if form == "rows" else 2
    read = torch.zeros(5, 5, dtype=torch.bool)
    read.view(-1)[: 5 * above + 2 + (mask == "inclusive")] = True

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, above, 4 - above)), weight * read)

    exact, plain, ours = (leaves(x.to(kind), weight.to(kind)) for kind in (torch.float64, dtype, dtype))
    upstream = normal(2, 24, 12, 13, seed=5).to(dtype)
    results = []
    for inputs, convolve in ((exact, dense), (plain, dense), (ours, None)):
        out = causal_conv2d(*inputs, mask=mask, form=form) if convolve is None else convolve(*inputs)
        grads = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
        results.append([out.double(), *(grad.double() for grad in grads)])
    for what, right, theirs, mine in zip(("out", "x", "weight"), *results, strict=True):
        for measure in (lambda error: error.abs().max(), lambda error: error.square().mean().sqrt()):
            assert measure(mine - right) <= 2 * measure(theirs - right), what


def test_fused_convolution_keeps_no_activation_and_no_padding() -> None:
    tensors = block_arguments("elu", "everywhere", True, True)
    given = dict(zip(tensors, leaves(*tensors.values()), strict=True))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_causal_conv2d(**given, activation="elu", gate=True)
    assert sorted(t.numel() for t in kept) == sorted([given["x"].numel(), given["weight"].numel(), 2 * 6 * 4 * 5])


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask": ({"mask": "loose"}, ArgumentError, "mask: expected one of 'strict', 'inclusive'"),
    "form": ({"form": "columns"}, ArgumentError, "form: expected one of 'rows', 'symmetric'"),
    "activation": ({"activation": "relu"}, ArgumentError, "activation: expected one of 'elu', 'concat_elu'"),
    "not-a-tensor": ({"x": [1.0]}, ArgumentTypeError, "x: expected a torch.Tensor"),
    "integers": ({"x": torch.zeros(2, 3, 4, 5).long()}, ArgumentTypeError, "x: expected a floating-point tensor"),
    "weight-1d": ({"weight": torch.zeros(6)}, ArgumentError, "weight: expected shape"),
    "no-taps": ({"weight": torch.zeros(6, 3, 0, 0)}, ArgumentError, "weight: expected a kernel of at least 1 x 1"),
    "concat": ({"activation": "concat_elu"}, ArgumentError, "weight: expected shape [O, 6, k, 3]"),
    "odd-gate": ({"weight": torch.zeros(5, 3, 3, 3)}, ArgumentError, "weight: expected an even number"),
    "bias": ({"bias": torch.zeros(3)}, ArgumentError, r"bias: expected shape \[6\]"),
    "context-grid": ({"context": torch.zeros(2, 6, 4, 1)}, ArgumentError, r"context: expected shape \[2, 6, 4, 5\]"),
    "context-uniform": ({"context": torch.zeros(2, 3, 1, 1)}, ArgumentError, r"context: expected shape \[2, 6, 1, 1\]"),
    "residual": ({"residual": torch.zeros(2, 6, 4, 5)}, ArgumentError, r"residual: expected shape \[2, 3, 4, 5\]"),
    "dtype": ({"weight": torch.zeros(6, 3, 3, 3).half()}, ArgumentTypeError, "weight: expected torch.float32 as for x"),
    "device": ({"bias": torch.zeros(6, device="meta")}, ArgumentError, "bias: expected device cpu as for x, got meta"),
    "backend": ({"backend": "cpp"}, ArgumentError, "backend: expected None or one of 'torch', 'fused', 'triton'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_fused_convolution_refuses(case: str) -> None:
    arguments, error, message = REFUSALS[case]
    call = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(6, 3, 3, 3), "gate": True, **arguments}
    with refuses(error, message.replace("[O", r"\[O").replace("3]", r"3\]") if case == "concat" else message):
        fused_causal_conv2d(**call)


def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = "backend: 'triton' was asked for but cannot run causal_conv2d here: it needs a GPU"
    with refuses(UnavailableError, message):
        causal_conv2d(torch.zeros(1, 3, 4, 5), torch.zeros(4, 3, 3, 3), backend="triton")
    with refuses(UnavailableError, message.replace("conv2d", "attention")):
        causal_attention(*(torch.zeros(1, 2, 5, 4) for _ in range(3)), backend="triton")


def test_backends_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.zeros(1, 3, 4, 5), torch.zeros(4, 3, 3, 3)
    lines = explain_backend("causal_conv2d", x, weight).splitlines()
    reason = "it needs a GPU, the tensor is on cpu"
    assert lines == ["torch: chosen: the first that can run", f"fused: {reason}", f"triton: {reason}"]
    query = torch.zeros(1, 2, 5, 4)
    lines = explain_backend("causal_attention", query, query, query).splitlines()
    assert lines == ["torch: chosen: the first that can run", "sdpa: could run, not chosen", f"triton: {reason}"]
    dropping = explain_backend("causal_attention", query, query, query, dropout=0.1).splitlines()
    assert dropping[1] == "sdpa: it drops weights, not logits"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype, width, limit in ((torch.float32, 129, " of float32 up to 128"), (torch.bfloat16, 300, " up to 256")):
        narrow, wide = query.to(dtype), torch.zeros(1, 2, 5, width, dtype=dtype)
        reason = why_no_triton() or f"it takes widths{limit}, not {width}"
        assert explain_backend("causal_attention", narrow, narrow, wide).splitlines()[2] == f"triton: {reason}"


@pytest.mark.parametrize("what", ["convolution", "gate", "attention"])
def test_gradients_are_not_differentiated_again(what: str) -> None:
    if what == "attention":
        inputs = leaves(*(normal(1, 2, 5, 3, seed=seed) for seed in range(3)))
        out, name = causal_attention(*inputs, dropout=0.2, seed=1), "causal_attention"
    else:
        inputs = leaves(normal(1, 2, 3, 4), normal(4, 2, 3, 3, seed=1))
        out, name = fused_causal_conv2d(*inputs, gate=what == "gate"), "causal_conv2d"
    found = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with refuses(UnavailableError, f"{name}: the gradient cannot be differentiated again"):
        torch.autograd.grad(sum(grad.square().sum() for grad in found), inputs)


def convolution_arguments() -> Iterator[Any]:
    for activation, gate in itertools.product([None, "elu", "concat_elu"], [False, True]):
        tensors = block_arguments(activation, "uniform", gate, True)
        values = [t.float().requires_grad_() for t in tensors.values()]
        yield pytest.param(
            (*values, "strict", "rows", activation, gate, gate, None), id=f"{activation}-{'gate' if gate else 'plain'}"
        )


@pytest.mark.parametrize("arguments", list(convolution_arguments()))
def test_convolution_is_registered_in_full(arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(torch.ops.fastvq.causal_conv2d.default, arguments)


# Their own derivatives raise, so that only the rest can be checked.
WITHOUT_GRADIENT = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_gradient_of_convolution_is_registered(needed: tuple[bool, bool]) -> None:
    grad, x, weight = (normal(*s).float() for s in ((2, 6, 4, 5), (2, 3, 4, 5), (6, 6, 3, 3)))
    for upstream, pre_gate in ((grad, None), (grad[:, :3], grad)):
        arguments = (upstream, x, weight, pre_gate, "inclusive", "symmetric", "concat_elu", *needed, None)
        torch.library.opcheck(torch.ops.fastvq.causal_conv2d_backward.default, arguments, test_utils=WITHOUT_GRADIENT)


@each_mask
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_is_registered_in_full(mask: Mask, dropout: float) -> None:
    query, key, value = (normal(2, 3, 7, w, seed=w).float().requires_grad_() for w in (4, 4, 5))
    seed = torch.tensor(3) if dropout else None
    torch.library.opcheck(torch.ops.fastvq.causal_attention.default, (query, key, value, seed, mask, dropout, None))
    out, lse = torch.ops.fastvq.causal_attention(
        query.detach(), key.detach(), value.detach(), seed, mask, dropout, None
    )
    arguments = (out, query.detach(), key.detach(), value.detach(), out, lse, seed, mask, dropout, None)
    torch.library.opcheck(torch.ops.fastvq.causal_attention_backward.default, arguments, test_utils=WITHOUT_GRADIENT)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_convolution_compiles_without_a_break(dynamic: bool) -> None:
    def run(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return fused_causal_conv2d(x.sin(), weight, activation="elu", gate=True, residual=residual).cos()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height, width in ((4, 5), (6, 3)):
        tensors = normal(2, 3, height, width), normal(8, 3, 3, 3, seed=1), normal(2, 4, height, width, seed=2)
        mine, theirs = leaves(*tensors), leaves(*tensors)
        out, want = compiled(*mine), run(*theirs)
        assert torch.equal(out, want)
        for grad, right in zip(gradients(out, mine), gradients(want, theirs), strict=True):
            assert torch.equal(grad, right)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_compiles_without_a_break(dropout: float) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value, dropout=dropout).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = leaves(*(normal(2, 2, 9, 4, seed=seed) for seed in range(3)))
    torch.manual_seed(3)
    out = compiled(*inputs)
    found = gradients(out, inputs)
    torch.manual_seed(3)
    want = run(*inputs)
    assert torch.equal(out, want)
    for grad, right in zip(found, gradients(want, inputs), strict=True):
        torch.testing.assert_close(grad, right)
    assert torch.equal(compiled(*inputs), out) == (dropout == 0)


@pytest.mark.parametrize("activation", ["elu", "concat_elu"])
def test_a_prior_compiles_without_a_break(activation: str) -> None:
    prior = snail(num_classes=3, activation=activation, dropout=0.1, attention_dropout=0.1)
    codes, label = torch.randint(5, (2, 3, 4)), torch.tensor([0, 2])
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(codes, label=label), prior(codes, label=label))
    prior.train()
    loss = torch.compile(lambda: prior.nll(codes, label=label).mean(), fullgraph=True, backend="aot_eager")
    losses = []
    for run in (loss, lambda: prior.nll(codes, label=label).mean()):
        torch.manual_seed(1)
        losses.append(run())
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())


@pytest.mark.parametrize("form", ["rows", "symmetric"])
def test_on_a_gpu_compilers_see_what_they_can_fuse(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators on the taps that are read, with the same results; here on a CPU."""
    monkeypatch.setattr(causal_backends, "is_left_to_compiler", lambda x, backend: torch.compiler.is_compiling())
    monkeypatch.setattr(library, "_GATHERED", 0)
    prior = snail(num_classes=3, form=form, activation="concat_elu")
    codes, label = torch.randint(5, (2, 3, 4)), torch.tensor([0, 2])
    seen: list[Any] = []

    def note(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    def nll() -> Tensor:
        return prior.nll(codes, label=label).mean()

    torch.testing.assert_close(torch.compile(nll, fullgraph=True, backend=note)(), nll())
    assert torch.ops.fastvq.causal_conv2d not in seen
    torch._dynamo.reset()
    parameters = list(prior.parameters())
    found = torch.autograd.grad(torch.compile(nll, fullgraph=True, backend="aot_eager")(), parameters)
    for mine, want in zip(found, torch.autograd.grad(nll(), parameters), strict=True):
        torch.testing.assert_close(mine, want)


def test_autocast_of_a_fused_convolution() -> None:
    tensors = {n: t.float() for n, t in block_arguments("elu", "uniform", True, True).items()}
    given = dict(zip(tensors, leaves(*tensors.values()), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_causal_conv2d(**given, activation="elu", gate=True)
        without = fused_causal_conv2d(given["x"], given["weight"])
    # The trunk stays as wide as it was.
    assert out.dtype == torch.float32
    assert without.dtype == torch.bfloat16
    exact = fused_causal_conv2d(**tensors, activation="elu", gate=True)
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()
    for name, grad in zip(given, gradients(out, list(given.values())), strict=True):
        assert grad.dtype == torch.float32, name


def test_autocast_of_a_prior() -> None:
    prior = snail(num_classes=3)
    codes, label = torch.randint(5, (2, 3, 4)), torch.tensor([0, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prior.nll(codes, label=label).mean()
    loss.backward()
    torch.testing.assert_close(loss, prior.nll(codes, label=label).mean(), rtol=0.02, atol=0.0)
    assert all(parameter.grad is not None for parameter in prior.parameters())


def test_flops_are_those_of_valid_taps() -> None:
    x, weight = leaves(normal(2, 3, 4, 5), normal(6, 3, 5, 5, seed=1))
    with FlopCounterMode(display=False) as counter:
        causal_conv2d(x, weight, mask="strict", form="symmetric").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 4 * 5) * 6 * 3 * 12
    query, value = normal(2, 3, 7, 4).requires_grad_(), normal(2, 3, 7, 5)
    with FlopCounterMode(display=False) as counter:
        causal_attention(query, query, value).sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 21 * ((4 + 5) + (3 * 4 + 2 * 5))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries, of heads and of samples even on small inputs."""
    monkeypatch.setattr(blocks, "_ROWS", 4)
    monkeypatch.setattr(blocks, "_LOGITS", {"cpu": 100})


def kept_logits(query: Tensor, mask: Mask, dropout: float, seed: int) -> Tensor:
    """[B, heads, N, N]: 1 where dropout leaves a logit."""
    length = query.shape[2]
    kept = query.new_zeros(*query.shape[:2], length, length)
    for tile in blocks._tiles(query, mask, dropout, seed):
        assert tile.kept is not None
        kept[(*tile.queries, tile.keys[2])] = (tile.kept != 0).to(kept.dtype)
    return kept


@pytest.mark.usefixtures("small_tiles")
@each_mask
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("length", [1, 4, 11])
@pytest.mark.parametrize("value_width", [3, 5])
def test_attention_in_blocks(mask: Mask, dropout: float, length: int, value_width: int) -> None:
    tensors = [normal(3, 2, length, w, seed=seed) for seed, w in enumerate((3, 3, value_width))]
    mine, theirs = leaves(*tensors), leaves(*tensors)
    seed = torch.tensor(11) if dropout else None
    out, lse = torch.ops.fastvq.causal_attention(*mine, seed, mask, dropout, None)
    kept = kept_logits(tensors[0], mask, dropout, 11) if dropout else None
    want = causal_attention_reference(*theirs, mask=mask, dropout=dropout, kept=kept)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for grad, right in zip(gradients(out, mine), gradients(want, theirs), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-11, atol=1e-11)
    assert (lse[:, :, 0] == -math.inf).all() == (mask == "strict")
    assert lse[:, :, 1:].isfinite().all()
    if dropout:
        assert torch.equal(causal_attention(*tensors, mask=mask, dropout=dropout, seed=11), out)


@each_mask
def test_blocks_cover_every_pair_once_within_the_budget(mask: Mask) -> None:
    for shape in ((1, 1, 4096, 1), (2, 8, 1024, 1), (32, 4, 16, 1), (3, 5, 130, 1)):
        query = torch.zeros(1).expand(shape)
        seen = torch.zeros(shape[:3], dtype=torch.int64)
        for tile in blocks._tiles(query, mask, 0.0, 0):
            batch, heads, rows = tile.queries
            sizes = [part.stop - part.start for part in (batch, heads, rows, tile.keys[2])]
            assert math.prod(sizes) <= max(1 << 18, 128 * shape[2])
            seen[batch, heads, rows] += 1
        assert (seen == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_those_of_plain_attention(dtype: torch.dtype) -> None:
    tensors = [normal(1, 2, 300, width, seed=width).to(dtype) for width in (16, 17, 24)]
    query, key, value = tensors[0], tensors[1][..., :16], tensors[2]
    exact, plain, ours = (leaves(*(t.to(kind) for t in (query, key, value))) for kind in (torch.float64, dtype, dtype))
    results = []
    for inputs, run in (
        (exact, causal_attention_reference),
        (plain, causal_attention_reference),
        (ours, causal_attention),
    ):
        out = run(*inputs)
        results.append([t.double() for t in (out, *gradients(out, inputs))])
    for right, theirs, mine in zip(*results, strict=True):
        assert (mine - right).abs().max() <= 2 * (theirs - right).abs().max()


def test_a_seed_decides_and_leaves_the_generator_alone() -> None:
    tensors = [normal(2, 2, 9, 4, seed=seed) for seed in range(3)]

    def attend(seed: int | None) -> Tensor:
        return causal_attention(*tensors, dropout=0.5, seed=seed)

    state = torch.get_rng_state()
    first = attend(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(attend(5), first)
    assert not torch.equal(attend(6), first)
    assert torch.equal(attend(2**63 - 1), attend(2**63 - 1))
    drawn = attend(None)
    assert not torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(attend(None), drawn)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dropout": 1.0}, ArgumentError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ArgumentError, "dropout: expected a probability"),
        ({"dropout": NAN}, ArgumentError, "dropout: expected a probability"),
        ({"dropout": "0.1"}, ArgumentTypeError, "dropout: expected a number, got str"),
        ({"seed": 1.0}, ArgumentTypeError, "seed: expected an int, got float"),
        ({"seed": -1}, ArgumentError, r"seed: must lie in 0..2\*\*63-1"),
        ({"seed": 2**63}, ArgumentError, r"seed: must lie in 0..2\*\*63-1"),
        ({"key": torch.zeros(1, 2, 5, 4).double()}, ArgumentTypeError, "key: expected torch.float32 as for query"),
        ({"value": torch.zeros(1, 2, 5, 4).long()}, ArgumentTypeError, "value: expected a floating-point tensor"),
        ({"query": None}, ArgumentTypeError, "query: expected a torch.Tensor"),
        ({"dropout": 0.1, "backend": "cpp"}, ArgumentError, "backend: expected None or one of 'torch', 'sdpa'"),
        ({"backend": "cpp"}, ArgumentError, "backend: expected None or one of 'torch', 'sdpa', 'triton'"),
    ],
    ids=["one", "negative", "nan", "text", "float-seed", "negative-seed", "large-seed", "dtype", "integers", "none",
         "backend-dropout", "backend"],
)  # fmt: skip
def test_attention_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {name: torch.zeros(1, 2, 5, 4) for name in ("query", "key", "value")}
    with refuses(error, message):
        causal_attention(**{**call, **arguments})


def plain_block(block: GatedBlock, x: Tensor, context: Tensor | None, aux: Tensor | None) -> Tensor:
    """Chen et al. 2017, figure 3, step by step."""

    def convolve(conv: nn.Module, x: Tensor) -> Tensor:
        if isinstance(conv, CausalConv2d):
            return causal_conv2d_reference(x, conv.weight, conv.bias, mask=conv.mask, form=conv.form)
        assert isinstance(conv, nn.Conv2d)
        return F.conv2d(x, conv.weight, conv.bias, padding=conv.padding)

    activated = activate(x, block.activation)
    h = convolve(block.conv1, activated)
    if aux is not None:
        assert block.aux is not None
        h = h + block.aux(activate(aux, block.activation))
    h = F.dropout(activate(h, block.activation), block.dropout, block.training)
    h = convolve(block.conv2, h)
    if context is not None:
        assert block.context is not None
        h = h + block.context(context)
    return (activated if block.legacy_skip else x) + F.glu(h, dim=1)


CONVS: dict[str, Callable[[int, int], nn.Module] | None] = {
    "pointwise": None,
    "causal": lambda i, o: CausalConv2d(i, o, 3, mask="inclusive", form="symmetric"),
    "dense": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
}


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("activation", ["elu", "concat_elu", "legacy"])
@pytest.mark.parametrize("joined", ["alone", "context", "aux"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gated_block_equals_its_steps(
    conv: str, activation: Any, joined: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(x: Tensor, p: float, training: bool = True) -> Tensor:
        """By place: PyTorch's own draws in the order of memory."""
        return x * (normal(*x.shape, seed=7) > 0) / (1 - p) if training and p else x

    monkeypatch.setattr(F, "dropout", drop)
    legacy = activation == "legacy"
    block = GatedBlock(
        4,
        6,
        conv=CONVS[conv],
        context_channels=3 if joined == "context" else 0,
        aux_channels=5 if joined == "aux" else 0,
        dropout=dropout,
        activation="elu" if legacy else activation,
        legacy_skip=legacy,
    ).double()
    x = normal(2, 4, 3, 5).requires_grad_()
    context = normal(2, 3, 1, 1, seed=1) if joined == "context" else None
    aux = normal(2, 5, 3, 5, seed=2) if joined == "aux" else None
    inputs = [x, *block.parameters()]
    out, want = block(x, context, aux), plain_block(block, x, context, aux)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for grad, right in zip(gradients(out, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-11, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize("conv", ["pointwise", "causal"])
@pytest.mark.parametrize("activation", ["elu", "concat_elu", "legacy"])
def test_gated_block_takes_one_step_on_a_gpu(conv: str, activation: Any) -> None:
    legacy = activation == "legacy"
    options: Any = {"activation": "elu" if legacy else activation, "legacy_skip": legacy}
    block = GatedBlock(5, 6, conv=CONVS[conv], context_channels=3, aux_channels=4, dropout=0.5, **options).cuda()
    shapes = (2, 5, 3, 4), (2, 3, 1, 1), (2, 4, 3, 4)
    x, context, aux = (normal(*shape, seed=seed).float().cuda() for seed, shape in enumerate(shapes))
    inputs = [x.requires_grad_(), *block.parameters()]
    with full_float32(torch.device("cuda")):
        assert "_Block" not in type(block(x, context, aux).grad_fn).__name__
        block.eval()
        out = block(x, context, aux)
        assert type(out.grad_fn).__name__ == "_BlockBackward"
        want = plain_block(block, x, context, aux)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        upstream = torch.randn_like(out)
        grads = (torch.autograd.grad(result, inputs, upstream) for result in (out, want))
        for mine, right in zip(*grads, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)


def test_modules_with_hooks_are_called() -> None:
    for make in (pointwise, CONVS["causal"]):
        assert make is not None
        conv = make(3, 4)
        assert block_step(conv, "elu", None) is not None
        hook = conv.register_forward_hook(lambda *given: None)
        assert block_step(conv, "elu", None) is None
        hook.remove()
        assert block_step(conv, "elu", None) is not None
    assert block_step(nn.Conv2d(3, 4, 1), "elu", None) is None


@needs_gpu
@each_mask
def test_all_backends_agree_on_a_gpu(mask: Mask) -> None:
    tensors = {n: t.cuda().float() for n, t in block_arguments("concat_elu", "uniform", True, True).items()}
    options = {"mask": mask, "activation": "concat_elu", "gate": True}
    results = {}
    with full_float32(torch.device("cuda")):
        for backend in ("torch", "fused", "triton"):
            given = dict(zip(tensors, leaves(*tensors.values()), strict=True))
            out = fused_causal_conv2d(**given, **options, backend=backend)
            results[backend] = [out, *torch.autograd.grad(out.square().sum(), list(given.values()))]
    for backend in ("fused", "triton"):
        for mine, theirs in zip(results[backend], results["torch"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@needs_gpu
@each_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_the_library_agrees_on_a_gpu(mask: Mask, dtype: torch.dtype) -> None:
    tensors = [normal(2, 2, 37, 16, seed=seed).to("cuda", dtype) for seed in range(3)]
    results = []
    with full_float32(torch.device("cuda")):
        for backend in ("sdpa", "triton"):
            inputs = leaves(*tensors)
            out = causal_attention(*inputs, mask=mask, backend=backend)
            results.append([out, *gradients(out.cpu(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        bound = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)
