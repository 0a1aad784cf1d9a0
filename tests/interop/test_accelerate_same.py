"""Accelerated quantisers beside the originals: outputs, gradients, state, and what they allocate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate_cases import ENCODERS, STEPPED, package
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastvq
from fastvq.interop.quantizers.kind import Accelerated

pytestmark = [
    pytest.mark.usefixtures("steady"),
    pytest.mark.filterwarnings("ignore::fastvq.errors.AccelerationWarning"),
]


def result(module: nn.Module, x: Tensor) -> dict[str, Any]:
    """Outputs, and gradients of a loss in which every element counts."""
    torch.manual_seed(11)
    x = x.clone().requires_grad_()
    module.zero_grad()
    outputs = pytree.tree_leaves(module(x))
    learnt = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
    weights = [torch.linspace(0.5, 1.5, out.numel()).view(out.shape) for out in learnt]
    torch.autograd.backward(learnt, weights)
    gradients = {name: value.grad for name, value in module.named_parameters()}
    return {"outputs": outputs, "of x": x.grad, **gradients}


def same(theirs: Any, ours: Any) -> None:
    """Up to rounding, which is relative to the largest terms of the sums that a tensor is made of."""
    expected, structure = pytree.tree_flatten(theirs)
    actual, of_ours = pytree.tree_flatten(ours)
    assert structure == of_ours
    for one, other in zip(expected, actual, strict=True):
        if not isinstance(one, Tensor):
            assert one is other is None
            continue
        scale = one.detach().abs().max().item() if one.is_floating_point() else 0
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * scale)
        assert other.requires_grad == one.requires_grad


@pytest.mark.parametrize("name", STEPPED)
def test_ten_training_steps_are_the_same(name: str) -> None:
    theirs, ours = STEPPED[name].pair(fastvq.accelerate)
    assert isinstance(ours, Accelerated) or "by level" in name
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) if [*m.parameters()] else None for m in (theirs, ours)]
    for step in range(10):
        x = STEPPED[name].input(step)
        same(result(theirs, x), result(ours, x))
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()
        same(dict(theirs.state_dict()), dict(ours.state_dict()))
    x = STEPPED[name].input(10)
    with torch.no_grad():
        same(theirs.eval()(x), ours.eval()(x))
    # Continued by the other: the states are of one kind.
    theirs.load_state_dict(ours.state_dict())
    same(result(theirs.train(), x), result(ours.train(), x))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    same(result(theirs, x), result(ours, x))


# Originals that multiply vectors by codes, which takes both to be of one type.
_FLOAT32 = ("port", "Encodec", "encodec", "encodec, k-means", "transformers Encodec")


@pytest.mark.parametrize("name", [name for name in {**STEPPED, **ENCODERS} if name not in _FLOAT32])
def test_types_are_the_same(name: str) -> None:
    case = {**STEPPED, **ENCODERS}[name]
    theirs, ours = case.pair(fastvq.accelerate)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for training in (True, False):
            found = []
            for module in (theirs.train(training), ours.train(training)):
                torch.manual_seed(0)
                x = case.input(0).to(dtype).requires_grad_()
                try:
                    outputs = pytree.tree_leaves(module.encode(x) if name in ENCODERS else module(x))
                    if name not in ENCODERS and outputs[0].requires_grad:
                        outputs[0].sum().backward()
                    found.append([out.dtype for out in [*outputs, x.grad] if isinstance(out, Tensor)])
                except RuntimeError as error:
                    found.append([str(error)])
            assert found[0] == found[1], (dtype, training)


@pytest.mark.parametrize("name", ENCODERS)
def test_codes_are_the_same(name: str) -> None:
    case = ENCODERS[name]
    theirs, ours = case.pair(fastvq.accelerate)
    assert isinstance(ours, Accelerated)
    x = case.input(0)
    codes = ours.encode(x)
    assert torch.equal(codes, theirs.encode(x))
    assert torch.equal(ours.decode(codes), theirs.decode(codes))


class Largest(TorchDispatchMode):
    """The most elements that a tensor made meanwhile has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("name", [name for name in STEPPED if "by level" not in name])
def test_nothing_has_an_element_for_each_vector_and_code(name: str) -> None:
    theirs, ours = STEPPED[name].pair(fastvq.accelerate)
    x = STEPPED[name].input(0)
    for module in (theirs, ours):
        module(x)  # what starts from the first batch has started
    for training in (True, False):
        with Largest() as seen:
            result(theirs.train(training), x)
        assert seen.elements >= x.numel() * 24 // 8
        with Largest() as seen:
            result(ours.train(training), x)
        assert seen.elements <= x.numel()


@pytest.mark.parametrize("name", [name for name in STEPPED if "no route" not in name and "ncodec" not in name])
def test_outputs_may_be_changed_in_place(name: str) -> None:
    theirs, ours = STEPPED[name].pair(fastvq.accelerate)
    given = STEPPED[name].input(0)
    gradients = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        x = given.clone().requires_grad_()
        out, *others = pytree.tree_leaves(module(x))
        assert out.requires_grad
        out.mul_(2)
        loss = out.sum() + sum(other.sum() for other in others if isinstance(other, Tensor) and other.requires_grad)
        loss.backward()
        gradients.append(x.grad)
    same(*gradients)


def test_codes_that_have_shrunk_are_not_nearer_by_angle() -> None:
    """Averages of a code that is not used underflow, and then its length does."""
    package("vector_quantize_pytorch")
    theirs, ours = STEPPED["VectorQuantize, cosine"].pair(fastvq.accelerate)
    for module in (theirs, ours):
        module._codebook.embed[0, :5] *= 1e-3
    for step in range(3):
        x = STEPPED["VectorQuantize, cosine"].input(step)
        same(result(theirs, x), result(ours, x))
        same(dict(theirs.state_dict()), dict(ours.state_dict()))


@pytest.mark.parametrize("name", ["VectorQuantize, plain", "ResidualVQ, plain", "Encodec"])
def test_compiled_passes_are_the_same(name: str) -> None:
    torch._dynamo.reset()
    theirs, ours = STEPPED[name].pair(fastvq.accelerate)
    compiled = torch.compile(ours, backend="aot_eager")
    for step in range(3):
        x = STEPPED[name].input(step)
        expected, actual = result(theirs, x), result(compiled, x)
        same([expected["outputs"], expected["of x"]], [actual["outputs"], actual["of x"]])
        same(dict(theirs.state_dict()), dict(ours.state_dict()))
