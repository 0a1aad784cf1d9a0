"""Compiled quantisers have no graph break and equal eager ones bit for bit, from the first batch on."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.config
from quantizer_helpers import normal
from torch import Tensor, nn

from fastvq.models import ResidualVQ, SimVQ, VectorQuantizer

pytestmark = pytest.mark.usefixtures("steady")

PLAIN: dict[str, dict[str, Any]] = {
    "average": {},
    "kmeans-revive": {"init": "kmeans", "revive_below": 0.9, "decay": 0.7},
    "data-cosine-heads-rotation": {"init": "data", "metric": "cosine", "heads": 2, "gradient": "rotation"},
    "own-codebooks": {"heads": 2, "separate_codebook_per_head": True, "init": "kmeans", "check_finite": True},
    "learnable": {"learnable_codebook": True, "init": "data", "revive_below": 0.9},
    "projected": {"input_dim": 8, "init": "data"},
}
RESIDUAL: dict[str, dict[str, Any]] = {
    "levels": {"init": "kmeans"},
    "shared": {"shared_codebook": True, "revive_below": 0.9, "init": "data"},
    "dropout": {"quantize_dropout": True, "gradient": "rotation"},
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def history(module: nn.Module, call: Any, channels: int, masked: bool, frozen: bool) -> list[Tensor]:
    """Everything that two training steps and an evaluation return, leave behind and pass back."""
    found: list[Tensor] = []
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(9)) < 0.7 if masked else None
    torch.manual_seed(0)
    steps = [(True, None), (True, None), (False, None)]
    for step, (training, freeze_codebook) in enumerate([*steps, (True, True)] if frozen else steps):
        module.train(training)
        x = normal(5, channels, 3, seed=step).requires_grad_()
        out = call(x, mask, freeze_codebook=freeze_codebook)
        module.zero_grad()
        (out.quantized.square().sum() + out.loss).backward()
        assert x.grad is not None
        found += [*(value.detach() for value in out), x.grad]
        found += [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
        found += [value.clone() for value in module.state_dict().values()]
    return found


@pytest.mark.parametrize(
    "options",
    [{"gradient": "rotation"}, {"learnable_codebook": True, "revive_below": 0.9}],
    ids=["rotation", "learnable"],
)
def test_the_backward_pass_uses_the_codes_from_before_the_update(options: dict[str, Any]) -> None:
    """A partitioner that saves memory computes anew what is cheap, from buffers that have changed by then."""
    quantizer = VectorQuantizer(6, 4, decay=0.5, **options)
    twin = copy.deepcopy(quantizer)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager_decomp_partition")
    gradients = []
    for call in (compiled, twin):
        torch.manual_seed(1)
        x = normal(5, 4, 3).requires_grad_()
        out = call(x)
        (out.quantized.square().sum() + out.loss).backward()
        gradients.append([x.grad, *(parameter.grad for parameter in (quantizer, twin)[call is twin].parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


def assert_compiled_equals_eager(module: nn.Module, channels: int, masked: bool, frozen: bool = False) -> None:
    twin = copy.deepcopy(module)
    want = history(twin, twin, channels, masked, frozen)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    have = history(module, compiled, channels, masked, frozen)
    assert len(have) == len(want)
    for index, (left, right) in enumerate(zip(have, want, strict=True)):
        assert torch.equal(left, right), (index, left, right)


@pytest.mark.parametrize(("name", "masked"), [(name, index % 2 == 1) for index, name in enumerate(PLAIN)], ids=PLAIN)
def test_quantiser(name: str, masked: bool) -> None:
    quantizer = VectorQuantizer(6, 4, **PLAIN[name])
    channels = PLAIN[name].get("input_dim", 4 * quantizer.heads)
    assert_compiled_equals_eager(quantizer, channels, masked, frozen=name == "average")


def test_codes_under_a_map() -> None:
    assert_compiled_equals_eager(SimVQ(6, 4), 4, masked=True)


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_quantiser(name: str) -> None:
    assert_compiled_equals_eager(ResidualVQ(2, 6, 4, **RESIDUAL[name]), 4, masked=name == "shared")


def test_other_batch_sizes_need_no_other_graphs() -> None:
    quantizer = VectorQuantizer(6, 4)
    twin = copy.deepcopy(quantizer)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for step, batch in enumerate((7, 5, 4, 9, 12)):
        x = normal(batch, 4, 3, seed=batch)
        # The second size makes the size a variable.
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            out = compiled(x)
        assert all(torch.equal(left, right) for left, right in zip(out, twin(x), strict=True))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_default_backend() -> None:
    quantizer = VectorQuantizer(6, 4, revive_below=0.9, decay=0.5, gradient="rotation")
    twin = copy.deepcopy(quantizer)
    compiled = torch.compile(quantizer, fullgraph=True)
    for step in range(2):
        results = []
        for call in (compiled, twin):
            torch.manual_seed(step)
            x = normal(5, 4, 3, seed=step).requires_grad_()
            out = call(x)
            (out.quantized.square().sum() + out.loss).backward()
            results.append([*out, x.grad])
        # Sums may be taken in another order.
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-6, atol=1e-6)


def arguments(quantizer: VectorQuantizer) -> tuple[Any, ...]:
    return (
        quantizer.embedding.clone(),
        quantizer.cluster_size.clone(),
        None if quantizer.embedding_sum is None else quantizer.embedding_sum.clone(),
    )


@pytest.mark.parametrize(
    "options", [{}, {"heads": 2, "separate_codebook_per_head": True}, {"learnable_codebook": True}]
)
@pytest.mark.parametrize("cosine", [False, True])
def test_operations_are_registered_properly(options: dict[str, Any], cosine: bool) -> None:
    quantizer = VectorQuantizer(6, 4, **options).requires_grad_(False)
    groups = 2 if "heads" in options else 1
    vectors, mask = normal(groups, 9, 4), torch.rand(groups, 9) < 0.7
    counts, sums = torch.randint(4, (2, groups, 6)), normal(groups, 6, 4)
    move = torch.ops.fastvq.move_codebook.default
    for where in (None, mask):
        # Without revival, which draws random numbers.
        torch.library.opcheck(move, (counts, sums, vectors, where, *arguments(quantizer), 0.9, 1e-5, 0.0, cosine, None))
        torch.library.opcheck(
            torch.ops.fastvq.start_codebook.default,
            (vectors, where, *arguments(quantizer), torch.tensor(True), "kmeans", 3, cosine, None),
        )
    torch.library.opcheck(torch.ops.fastvq.snapshot.default, (vectors, True))
