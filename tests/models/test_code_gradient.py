"""What codes pass back to vectors: unchanged, or turned by the rotation that takes the vector onto its code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import refuses
from quantizer_helpers import normal, rotation_matrices
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.models import VectorQuantizer
from fastvq.models.quantizer.gradient import pass_gradient

pytestmark = pytest.mark.usefixtures("steady")

F64 = torch.float64


def gradient(x: Tensor, code: Tensor, upstream: Tensor, kind: str) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = pass_gradient(leaf, code, kind)  # type: ignore[arg-type]
    assert torch.equal(out, code)
    assert out.dtype == code.dtype
    return torch.autograd.grad(out, leaf, upstream)[0]


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (7, 2), (33, 5), (4, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_rotation_gradient_is_that_of_the_matrix(rows: int, dim: int, dtype: torch.dtype, tolerance: float) -> None:
    x, code, upstream = (normal(rows, dim, seed=seed, dtype=dtype) for seed in range(3))
    # In one dimension a vector and a code of other sign are opposite, where the matrix has no r.
    code = code.abs() * x.sign() if dim == 1 else code
    want = torch.einsum("nij,ni->nj", rotation_matrices(x, code), upstream.double())
    torch.testing.assert_close(gradient(x, code, upstream, "rotation").double(), want, rtol=tolerance, atol=tolerance)


def test_rotation_gradcheck_with_the_rotation_held_constant() -> None:
    """The value does not depend on x smoothly; the map x -> s R x with s R fixed does, and has the same gradient."""
    x, code = normal(5, 4, dtype=F64).requires_grad_(), normal(5, 4, seed=1, dtype=F64)
    fixed, start = rotation_matrices(x.detach(), code), x.detach().clone()

    def surrogate(value: Tensor) -> Tensor:
        moved = torch.einsum("nij,nj->ni", fixed, value.detach() - start)
        # At x itself, where the gradient is taken, this adds nothing.
        return pass_gradient(start + (value - value.detach()), code, "rotation") + moved

    torch.testing.assert_close(torch.einsum("nij,nj->ni", fixed, start), code, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(surrogate, (x,))


def test_rotation_keeps_lengths_and_angles() -> None:
    x, code, upstream = (normal(50, 6, seed=seed, dtype=F64) for seed in range(3))
    found = gradient(x, code, upstream, "rotation")
    scale = code.norm(dim=1) / x.norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), scale * upstream.norm(dim=1))
    # A gradient has the angle to x that it had to the code.
    torch.testing.assert_close(torch.cosine_similarity(found, x), torch.cosine_similarity(upstream, code))


def test_rotation_is_the_identity_where_vector_and_code_are_equal() -> None:
    x, upstream = normal(20, 6, dtype=F64), normal(20, 6, seed=1, dtype=F64)
    torch.testing.assert_close(gradient(x, x.clone(), upstream, "rotation"), upstream, rtol=1e-13, atol=1e-13)


def test_rotation_of_vectors_without_direction() -> None:
    x, code, upstream = normal(3, 4, dtype=F64), normal(3, 4, seed=1, dtype=F64), normal(3, 4, seed=2, dtype=F64)
    x[0], code[1], code[2] = 0, 0, -2 * x[2]
    found = gradient(x, code, upstream, "rotation")
    assert torch.equal(found[:2], upstream[:2])
    a = x[2] / x[2].norm()
    # Opposite: the reflection that turns a over, scaled by 2.
    torch.testing.assert_close(found[2], 2 * (upstream[2] - 2 * a * (a @ upstream[2])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotation_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, code, upstream = (normal(30, 8, seed=seed).to(dtype) for seed in range(3))
    wide = gradient(x.float(), code.float(), upstream.float(), "rotation")
    assert torch.equal(gradient(x, code, upstream, "rotation"), wide.to(dtype))


@pytest.mark.parametrize("kind", ["straight_through", "rotation"])
def test_second_derivatives_are_those_of_a_linear_map(kind: str) -> None:
    x, code = normal(3, 4, dtype=F64).requires_grad_(), normal(3, 4, seed=1, dtype=F64)
    upstream = normal(3, 4, seed=2, dtype=F64).requires_grad_()
    (first,) = torch.autograd.grad(pass_gradient(x, code, kind), x, upstream, create_graph=True)  # type: ignore[arg-type]
    probe = normal(3, 4, seed=3, dtype=F64)
    fixed = rotation_matrices(x.detach(), code) if kind == "rotation" else torch.eye(4, dtype=F64).expand(3, 4, 4)
    (second,) = torch.autograd.grad(first, upstream, probe)
    torch.testing.assert_close(second, torch.einsum("nij,nj->ni", fixed, probe))


def test_straight_through_output_may_be_changed_in_place() -> None:
    quantizer = VectorQuantizer(6, 4)
    x = normal(2, 4, 5).requires_grad_()
    out = torch.relu_(quantizer(x).quantized)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (out > 0).float())


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"metric": "cosine"}], ids=["plain", "heads", "cosine"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_quantiser_passes_the_rotated_gradient(options: dict[str, Any], training: bool) -> None:
    quantizer = VectorQuantizer(6, 4, gradient="rotation", channels_last=True, **options).double().train(training)
    heads = quantizer.heads
    x = normal(7, 4 * heads, dtype=F64).requires_grad_()
    upstream = normal(7, 4 * heads, seed=1, dtype=F64)
    out = quantizer(x)
    (found,) = torch.autograd.grad(out.quantized, x, upstream)
    compared = x.view(-1, 4)
    if options.get("metric") == "cosine":
        compared = compared / compared.norm(dim=1, keepdim=True)
    fixed = rotation_matrices(compared.detach(), out.quantized.detach().view(-1, 4))
    mapped = torch.einsum("nij,nj->ni", fixed, compared).view_as(x)
    (want,) = torch.autograd.grad(mapped, x, upstream)
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


def test_gradient_is_refused() -> None:
    with refuses(ArgumentError, "gradient: expected one of 'straight_through', 'rotation', got 'rotate'"):
        VectorQuantizer(6, 4, gradient="rotate")  # type: ignore[arg-type]
