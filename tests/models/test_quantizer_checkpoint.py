"""Quantisers in regions that `torch.utils.checkpoint` runs again in backward: nothing differs from a plain pass."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from helpers import refuses
from quantizer_helpers import normal
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastvq.errors import UnavailableError
from fastvq.models import VQVAE2, ResidualVQ, VectorQuantizer
from fastvq.models.repeated_pass import PassMemory
from fastvq.training.stage1 import _Reconstruction

pytestmark = pytest.mark.usefixtures("steady")

Region = Callable[..., Any]

EACH_KIND = pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])

REFUSED = "torch.utils.checkpoint: a quantiser's pass that moves the codebook runs again in backward, and"

# Moved far in one step, so that the codes after it give other gradients.
FAST: dict[str, Any] = {"decay": 0.3, "channels_last": True}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: VectorQuantizer(8, 4, **FAST),
    "rotation": lambda: VectorQuantizer(8, 4, gradient="rotation", **FAST),
    "cosine": lambda: VectorQuantizer(8, 4, metric="cosine", **FAST),
    "heads": lambda: VectorQuantizer(8, 2, heads=2, separate_codebook_per_head=True, **FAST),
    "data": lambda: VectorQuantizer(8, 4, init="data", **FAST),
    "kmeans-revive": lambda: VectorQuantizer(8, 4, init="kmeans", revive_below=6.0, **FAST),
    "learnable": lambda: VectorQuantizer(8, 4, learnable_codebook=True, revive_below=6.0, **FAST),
    "learnable-cosine": lambda: VectorQuantizer(
        8, 4, learnable_codebook=True, metric="cosine", revive_below=6.0, **FAST
    ),
    "frozen": lambda: VectorQuantizer(8, 4, freeze_codebook=True, **FAST),
    "residual": lambda: ResidualVQ(3, 8, 4, init="kmeans", revive_below=6.0, **FAST),
    "residual-dropout": lambda: ResidualVQ(3, 8, 4, quantize_dropout=True, init="data", revive_below=6.0, **FAST),
    "residual-shared": lambda: ResidualVQ(
        3, 8, 4, shared_codebook=True, quantize_dropout=True, init="data", revive_below=6.0, **FAST
    ),
}


def plain(function: Region, *args: Tensor) -> Any:
    return function(*args)


def region(reentrant: bool) -> Region:
    return lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)


def started(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(0)
    return make(), nn.Linear(4, 4)


def state(*modules: nn.Module) -> dict[str, Tensor]:
    found = {}
    for index, module in enumerate(modules):
        for name, value in module.state_dict().items():
            found[f"{index}.{name}"] = value.clone()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"{index}.{name}.grad"] = parameter.grad.clone()
    return found


def steps(run: Region, make: Callable[[], nn.Module], masked: bool = False) -> dict[str, Tensor]:
    """Gradients, codebook and random numbers after two steps through an encoder, the quantiser and dropout."""
    quantizer, encoder = started(make)
    mask = torch.arange(60).view(30, 2) % 3 != 0 if masked else None

    def body(x: Tensor) -> tuple[Tensor, Tensor]:
        out = quantizer(encoder(x), mask)
        # Its numbers come after those that the quantiser draws.
        return nn.functional.dropout(out.quantized, 0.5), out.loss

    found = {}
    for step in range(2):
        x = normal(30, 2, 4, seed=step).requires_grad_()
        quantized, loss = run(body, x)
        ((quantized - normal(30, 2, 4, seed=9)).square().mean() + loss).backward()
        assert x.grad is not None
        found[f"x{step}"] = x.grad
    return found | state(quantizer, encoder) | {"random": torch.rand(4)}


@EACH_KIND
@pytest.mark.parametrize("name", MODULES)
def test_equals_a_plain_pass(name: str, reentrant: bool) -> None:
    # The same operations on the same values in the same order: not even rounding differs.
    torch.testing.assert_close(steps(region(reentrant), MODULES[name]), steps(plain, MODULES[name]), rtol=0, atol=0)


@EACH_KIND
@pytest.mark.parametrize("name", ["plain", "kmeans-revive", "residual-shared"])
def test_with_a_mask(name: str, reentrant: bool) -> None:
    want = steps(plain, MODULES[name], masked=True)
    torch.testing.assert_close(steps(region(reentrant), MODULES[name], masked=True), want, rtol=0, atol=0)


def accumulated(run: Region, make: Callable[[], nn.Module], same_input: bool = False) -> dict[str, Tensor]:
    """Three regions forward, then one backward through all of them."""
    quantizer, encoder = started(make)

    def body(x: Tensor) -> Tensor:
        out = quantizer(encoder(x))
        return (out.quantized - 1).square().mean() + out.loss

    inputs = [normal(30, 4, seed=0 if same_input else step).requires_grad_() for step in range(3)]
    sum(run(body, x) for x in inputs).backward()
    return state(quantizer, encoder)


@EACH_KIND
@pytest.mark.parametrize("same_input", [False, True], ids=["own-inputs", "one-input"])
@pytest.mark.parametrize("name", ["plain", "learnable", "residual", "residual-shared"])
def test_several_regions_before_one_backward_pass(name: str, same_input: bool, reentrant: bool) -> None:
    want = accumulated(plain, MODULES[name], same_input)
    found = accumulated(region(reentrant), MODULES[name], same_input)
    # Gradients are added up in another order.
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


def twice(run: Region, same_input: bool) -> dict[str, Tensor]:
    quantizer, encoder = started(MODULES["rotation"])

    def body(x: Tensor) -> Tensor:
        first = quantizer(encoder(x))
        second = quantizer(encoder(x if same_input else first.quantized))
        return (first.quantized - 1).square().mean() + (second.quantized + 1).square().mean() + second.loss

    run(body, normal(30, 4).requires_grad_()).backward()
    return state(quantizer, encoder)


@EACH_KIND
def test_used_twice_in_a_region(reentrant: bool) -> None:
    torch.testing.assert_close(twice(region(reentrant), False), twice(plain, False), rtol=1e-5, atol=1e-7)


def test_used_twice_in_a_region_with_the_same_input() -> None:
    torch.testing.assert_close(twice(region(False), True), twice(plain, True), rtol=1e-5, atol=1e-7)


@EACH_KIND
def test_regions_inside_of_each_other(reentrant: bool) -> None:
    run = region(reentrant)
    want = steps(plain, MODULES["kmeans-revive"])
    found = steps(lambda body, x: run(lambda y: run(body, y), x), MODULES["kmeans-revive"])
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_two_backward_passes_through_one_region() -> None:
    gradients = []
    for run in (plain, region(False)):
        quantizer, encoder = started(MODULES["rotation"])
        x = normal(30, 4).requires_grad_()
        loss = run(lambda x, q=quantizer, e=encoder: q(e(x)).quantized.square().mean(), x)
        loss.backward(retain_graph=True)
        quantizer(normal(30, 4, seed=5))
        loss.backward()
        gradients.append([x.grad, encoder.weight.grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@EACH_KIND
def test_codes_of_a_frozen_pass_that_another_pass_has_moved(reentrant: bool) -> None:
    gradients = []
    for run in (plain, region(reentrant)):
        quantizer, encoder = started(MODULES["rotation"])
        x = normal(30, 4).requires_grad_()
        loss = run(lambda x, q=quantizer, e=encoder: q(e(x), freeze_codebook=True).quantized.square().mean(), x)
        quantizer(normal(30, 4, seed=5))
        loss.backward()
        gradients.append([x.grad, encoder.weight.grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_rounding_upstream_may_differ() -> None:
    """With gradients off other kernels may run than with them on."""
    quantizer, _ = started(MODULES["plain"])
    x = normal(30, 4).requires_grad_()

    def body(x: Tensor) -> Tensor:
        return quantizer(x * (1 + 1e-6 if torch.is_grad_enabled() else 1)).quantized.sum()

    before = quantizer.embedding.clone()
    checkpoint(body, x, use_reentrant=True).backward()
    moved = copy.deepcopy(quantizer.embedding)
    quantizer.embedding.copy_(before)
    quantizer.cluster_size.fill_(1)
    quantizer.embedding_sum.copy_(before)  # type: ignore[union-attr]
    quantizer(x.detach())
    assert torch.equal(moved, quantizer.embedding)


@EACH_KIND
def test_vectors_that_are_not_finite(reentrant: bool) -> None:
    found = []
    for run in (plain, region(reentrant)):
        quantizer, _ = started(MODULES["plain"])
        x = normal(30, 4)
        x[3, 1], x[5, 0] = torch.nan, torch.inf
        x.requires_grad_()
        run(lambda x, q=quantizer: q(x).quantized, x).square().sum().backward()
        found.append([x.grad, quantizer.embedding])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@EACH_KIND
def test_a_whole_model(reentrant: bool) -> None:
    found = []
    for run in (plain, region(reentrant)):
        torch.manual_seed(0)
        model = VQVAE2.from_preset("digits")
        images = normal(4, model.config.in_channels, 16, 16).requires_grad_()

        def body(images: Tensor, model: Any = model) -> Tensor:
            out = model(images)
            return (out.reconstruction - images).square().mean() + out.commitment_loss

        run(body, images).backward()
        found.append(state(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_accumulation_sees_the_vectors_of_a_region_once() -> None:
    model = VQVAE2.from_preset("digits")
    seen: list[int] = []
    with _Reconstruction.accumulation(cast(Any, None), model):
        for step in range(2):
            images = normal(4, model.config.in_channels, 16, 16, seed=step).requires_grad_()
            checkpoint(model, images, use_reentrant=False).reconstruction.square().sum().backward()
        for quantizer in model.quantizers:
            quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    assert seen == [8] * model.num_levels


def test_selective_checkpoint() -> None:
    """It hands out saved results by how often an operation has run; what is remembered must not count."""
    kept = torch.ops.aten.clone.default, torch.ops.aten.slice.Tensor, torch.ops.aten.addmm.default

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    def body(x: Tensor) -> Tensor:
        out = quantizer(encoder(x).clone())
        return (out.quantized.clone()[1:].exp() * x.clone()[1:]).sum() + out.loss

    found = []
    for options in ({}, {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}):
        quantizer, encoder = started(MODULES["rotation"])
        x = normal(30, 4).requires_grad_()
        loss = checkpoint(body, x, use_reentrant=False, **options) if options else body(x)
        loss.backward()
        found.append([x.grad, state(quantizer, encoder)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@EACH_KIND
def test_a_pass_that_is_not_known_is_refused(reentrant: bool) -> None:
    quantizer, _ = started(MODULES["plain"])
    inputs = iter([1.0, 2.0])
    x = normal(30, 4).requires_grad_()
    loss = region(reentrant)(lambda x: quantizer(x * next(inputs)).loss, x)
    before = quantizer.embedding.clone()
    with refuses(UnavailableError, f"{REFUSED} its first run is not known: other input, or too long ago; keep"):
        loss.backward()
    assert torch.equal(quantizer.embedding, before)


def passes(memory: PassMemory | nn.Module) -> int:
    if isinstance(memory, nn.Module):
        assert isinstance(memory, VectorQuantizer)
        memory = memory._passes
    return len(memory._passes)


def test_ordinary_passes_are_not_remembered() -> None:
    quantizer, _ = started(MODULES["plain"])
    quantizer(normal(30, 4).requires_grad_()).loss.backward()
    quantizer.eval()
    with torch.no_grad():
        quantizer(normal(30, 4))
    quantizer.train()
    with torch.inference_mode():
        copy.deepcopy(quantizer)(normal(30, 4))
    assert passes(quantizer) == 0


@EACH_KIND
def test_repeated_passes_are_forgotten(reentrant: bool) -> None:
    quantizer, encoder = started(MODULES["plain"])
    gc.disable()  # without waiting for a collection
    try:
        for step in range(5):
            x = normal(30, 4, seed=step).requires_grad_()
            region(reentrant)(lambda x: quantizer(encoder(x)).quantized, x).sum().backward()
            assert passes(quantizer) == 1
    finally:
        gc.enable()


def test_passes_that_nobody_repeats_are_few() -> None:
    # 8 MiB by its shape, without holding them.
    memory, codes = PassMemory(), torch.ones(1).expand(1, 1 << 16, 32)
    with torch.no_grad():
        for step in range(40):
            memory.remember(torch.full((2, 3), float(step)), codes, torch.ones(1))
    assert passes(memory) == 16
    assert memory.recall(torch.full((2, 3), 39.0)) is memory._passes[-1]
    assert memory.recall(torch.full((2, 3), 5.0)) is None


def test_hooks_for_saved_tensors_alone_change_nothing() -> None:
    found = []
    for context in (torch.enable_grad(), save_on_cpu()):
        with context:
            found.append(steps(plain, MODULES["kmeans-revive"]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_copies_and_files_hold_no_passes() -> None:
    quantizer, encoder = started(MODULES["plain"])
    names = set(quantizer.state_dict())
    loss = checkpoint(lambda x: quantizer(encoder(x)).loss, normal(30, 4).requires_grad_(), use_reentrant=False)
    assert passes(quantizer) == 1
    file = io.BytesIO()
    torch.save(quantizer, file)
    file.seek(0)
    others = copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), torch.load(file, weights_only=False)
    for other in others:
        assert passes(other) == 0
        other(normal(30, 4))
    assert set(quantizer.state_dict()) == names
    loss.backward()


def test_modules_pickled_without_a_memory_load() -> None:
    quantizer, _ = started(MODULES["plain"])
    old = {name: value for name, value in vars(quantizer).items() if name != "_passes"}
    loaded = VectorQuantizer.__new__(VectorQuantizer)
    loaded.__setstate__(old)
    with torch.no_grad():
        loaded(normal(30, 4))
    assert passes(loaded) == 1


@EACH_KIND
def test_a_compiled_pass_in_a_region_is_refused(reentrant: bool) -> None:
    torch.compiler.reset()
    quantizer, encoder = started(MODULES["plain"])
    compiled = torch.compile(lambda x: quantizer(encoder(x)).loss, backend="aot_eager", fullgraph=True)
    loss = checkpoint(compiled, normal(30, 4).requires_grad_(), use_reentrant=reentrant)
    with refuses(UnavailableError, f"{REFUSED} compiled passes are not remembered; keep"):
        loss.backward()
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_a_region_in_a_compiled_pass_is_refused() -> None:
    torch.compiler.reset()
    quantizer, encoder = started(MODULES["rotation"])

    @torch.compile
    def compiled(x: Tensor) -> Tensor:
        return checkpoint(lambda x: quantizer(encoder(x)).quantized.square().sum(), x, use_reentrant=False)

    loss = compiled(normal(30, 4).requires_grad_())
    with refuses(UnavailableError, f"{REFUSED} compiled passes are not remembered; keep"):
        loss.backward()
    torch.compiler.reset()
