"""Transforms of torch.func and forward-mode derivatives: right values, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import refuses, snail
from quantizer_helpers import buffers, normal, rotation_matrices, same
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from fastvq.errors import UnavailableError
from fastvq.models import VQVAE2, ResidualVQ, VectorQuantizer
from fastvq.models.quantizer.gradient import pass_gradient
from fastvq.ops import (
    causal_attention,
    causal_attention_reference,
    causal_conv2d,
    causal_conv2d_reference,
    draw,
    ema_update,
    fused_causal_conv2d,
    fused_causal_conv2d_reference,
    nearest_code,
    nearest_code_statistics,
)

pytestmark = pytest.mark.usefixtures("steady")

F64 = torch.float64
BATCH = 3


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, None), (-1, 1)], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_code_of_a_batch(heads: int | None, axes: tuple[int | None, int | None], metric: Any) -> None:
    lead = [] if heads is None else [heads]
    x, codes = normal(BATCH, *lead, 7, 4), normal(BATCH, *lead, 5, 4, seed=1)
    samples = [(x[i if axes[0] is not None else 0], codes[i if axes[1] is not None else 0]) for i in range(BATCH)]
    given = [value[0] if axis is None else value.movedim(0, axis) for value, axis in zip((x, codes), axes, strict=True)]
    found = vmap(lambda x, c: nearest_code(x, c, metric=metric), in_dims=axes)(*given)
    assert torch.equal(found, torch.stack([nearest_code(a, b, metric=metric) for a, b in samples]))
    mask = torch.rand(BATCH, *lead, 7) < 0.6
    statistics = vmap(lambda x, c, m: nearest_code_statistics(x, c, mask=m, metric=metric), in_dims=(*axes, 0))(
        *given, mask
    )
    want = [nearest_code_statistics(a, b, mask=m, metric=metric) for (a, b), m in zip(samples, mask, strict=True)]
    for field, value in zip(statistics._fields, statistics, strict=True):
        torch.testing.assert_close(value, torch.stack([getattr(one, field) for one in want]), rtol=0, atol=0)


def test_nearest_code_of_batches_of_batches_and_of_nothing() -> None:
    x, codes = normal(2, BATCH, 7, 4), normal(2, 5, 4, seed=1)
    found = vmap(vmap(nearest_code, (0, None)))(x, codes)
    assert torch.equal(
        found, torch.stack([torch.stack([nearest_code(a, c) for a in b]) for b, c in zip(x, codes, strict=True)])
    )
    assert vmap(nearest_code, (0, None))(torch.zeros(BATCH, 0, 4), codes[0]).shape == (BATCH, 0)


def error_of(x: Tensor, codes: Tensor, mask: Tensor | None = None) -> Tensor:
    return nearest_code_statistics(x, codes, mask=mask).squared_error


def plain_error(x: Tensor, codes: Tensor, mask: Tensor | None = None) -> Tensor:
    squares = (x - codes[nearest_code(x.detach(), codes.detach())]).square().sum(-1)
    return (squares if mask is None else squares[mask]).sum()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_derivatives_of_the_squared_error(masked: bool) -> None:
    x, codes = normal(7, 4, dtype=F64), normal(5, 4, seed=1, dtype=F64)
    mask = torch.arange(7) % 3 != 0 if masked else None
    leaves = x.clone().requires_grad_(), codes.clone().requires_grad_()
    want = torch.autograd.grad(plain_error(*leaves, mask), leaves)
    for found in (
        grad(error_of, (0, 1))(x, codes, mask),
        jacrev(error_of, (0, 1))(x, codes, mask),
        jacfwd(error_of, (0, 1))(x, codes, mask),
    ):
        torch.testing.assert_close(found, want)
    tangents = normal(7, 4, seed=2, dtype=F64), normal(5, 4, seed=3, dtype=F64)
    slope = sum((one * other).sum() for one, other in zip(want, tangents, strict=True))
    torch.testing.assert_close(jvp(lambda x, c: error_of(x, c, mask), (x, codes), tangents)[1], slope)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip((x, codes), tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(error_of(*duals, mask)).tangent, slope)
    second = torch.autograd.functional.hessian(lambda x: plain_error(x, codes, mask), x)
    torch.testing.assert_close(hessian(error_of)(x, codes, mask), second)


def test_gradients_of_the_squared_error_of_a_batch() -> None:
    x, codes = normal(BATCH, 7, 4, dtype=F64), normal(5, 4, seed=1, dtype=F64)
    found = vmap(grad(error_of, (0, 1)), (0, None))(x, codes)
    for i in range(BATCH):
        leaves = x[i].clone().requires_grad_(), codes.clone().requires_grad_()
        torch.testing.assert_close([one[i] for one in found], list(torch.autograd.grad(plain_error(*leaves), leaves)))


@pytest.mark.parametrize("kind", ["straight_through", "rotation"])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["f64", "f32"])
def test_what_codes_pass_back_and_on(kind: Any, dtype: torch.dtype) -> None:
    x, code = normal(BATCH, 7, 4, dtype=dtype), normal(BATCH, 7, 4, seed=1, dtype=dtype)
    eye = torch.eye(4, dtype=F64).expand(7, 4, 4)
    precision: dict[str, float] = {} if dtype == F64 else {"rtol": 2e-5, "atol": 2e-5}
    # Rows do not see each other.
    maps = torch.stack([rotation_matrices(a, c) if kind == "rotation" else eye for a, c in zip(x, code, strict=True)])
    jacobians = torch.einsum("bnij,nm->bnimj", maps, torch.eye(7, dtype=F64))

    def function(x: Tensor, code: Tensor) -> Tensor:
        return pass_gradient(x, code, kind)

    assert torch.equal(vmap(function)(x, code), code)
    assert torch.equal(vmap(function, (0, None))(x, code[0]), code[0].expand(BATCH, 7, 4))
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(function)(x[0], code[0]).to(F64), jacobians[0], **precision)
        torch.testing.assert_close(vmap(jacobian(function))(x, code).to(F64), jacobians, **precision)
        assert not jacobian(function, 1)(x[0], code[0]).any()
    tangent = normal(7, 4, seed=2, dtype=dtype)
    want = torch.einsum("nij,nj->ni", maps[0], tangent.to(F64))
    value, slope = jvp(lambda x: function(x, code[0]), (x[0],), (tangent,))
    assert torch.equal(value, code[0])
    torch.testing.assert_close(slope.to(F64), want, **precision)
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(x[0], tangent), code[0])
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent.to(F64), want, **precision)


def test_codes_pass_on_in_their_own_type() -> None:
    x, code, tangent = normal(5, 4), normal(5, 4, seed=1).bfloat16(), normal(5, 4, seed=2)
    for kind in ("straight_through", "rotation"):
        assert jvp(lambda x, kind=kind: pass_gradient(x, code, kind), (x,), (tangent,))[1].dtype == torch.bfloat16


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: VectorQuantizer(6, 4, channels_last=True),
    "rotation": lambda: VectorQuantizer(6, 4, channels_last=True, gradient="rotation"),
    "cosine": lambda: VectorQuantizer(6, 4, channels_last=True, metric="cosine", check_finite=True),
    "heads": lambda: VectorQuantizer(6, 2, channels_last=True, heads=2, separate_codebook_per_head=True),
    "shared-heads": lambda: VectorQuantizer(6, 2, channels_last=True, heads=2),
    "learnable": lambda: VectorQuantizer(6, 4, channels_last=True, learnable_codebook=True, metric="cosine"),
    "residual": lambda: ResidualVQ(2, 6, 4, channels_last=True),
    "residual-shared": lambda: ResidualVQ(2, 6, 4, channels_last=True, shared_codebook=True, gradient="rotation"),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]().double()


def loss_of(module: nn.Module, x: Tensor, state: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    out = module(x, **options) if state is None else functional_call(module, state, (x,), options)
    return (out.quantized - 1).square().sum() + out.loss


def gradients(module: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    return list(torch.autograd.grad(loss_of(module, leaves[0], **options), leaves))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["eval", "frozen"])
def test_quantisers(name: str, mode: str) -> None:
    module = made(name).train(mode == "frozen")
    options = {"freeze_codebook": True} if mode == "frozen" else {}
    parameters = dict(module.named_parameters())
    state = dict(module.named_buffers())
    x = normal(BATCH, 7, 4, dtype=F64)

    def loss(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(module, x, {**parameters, **state}, **options)

    want = [gradients(module, one, **options) for one in x]
    found = vmap(grad(loss, (0, 1)), (0, None))(x, parameters)
    for i in range(BATCH):
        torch.testing.assert_close([found[0][i], *(value[i] for value in found[1].values())], want[i])
    single = grad(loss, (0, 1))(x[0], parameters)
    torch.testing.assert_close([single[0], *single[1].values()], want[0])
    torch.testing.assert_close(jacfwd(loss)(x[0], parameters), want[0][0])
    tangent = normal(7, 4, seed=2, dtype=F64)
    slope = jvp(lambda x: loss(x, parameters), (x[0],), (tangent,))[1]
    torch.testing.assert_close(slope, (want[0][0] * tangent).sum())


@pytest.mark.parametrize("name", MODULES)
def test_everything_that_a_pass_over_a_batch_returns(name: str) -> None:
    module = made(name).eval()
    x, mask = normal(BATCH, 7, 4, dtype=F64), torch.arange(21).view(BATCH, 7) % 4 != 0
    for masks in (None, mask):
        found = vmap(lambda x, m: tuple(module(x, m)), (0, None if masks is None else 0))(x, masks)
        want = [module(one, None if masks is None else masks[i]) for i, one in enumerate(x)]
        for index, value in enumerate(found):
            torch.testing.assert_close(value, torch.stack([one[index] for one in want]))
    codes = torch.stack([module.encode(one) for one in x])
    assert torch.equal(vmap(module.encode)(x), codes)
    assert torch.equal(vmap(module.lookup)(codes), torch.stack([module.lookup(one) for one in codes]))


def test_an_ensemble_of_quantisers() -> None:
    modules = [VectorQuantizer(6, 4, channels_last=True).eval() for _ in range(BATCH)]
    parameters, state = stack_module_state(modules)
    x = normal(7, 4)
    found = vmap(lambda state: tuple(functional_call(modules[0], state, (x,))))({**parameters, **state})
    for index, value in enumerate(found):
        torch.testing.assert_close(value, torch.stack([module(x)[index] for module in modules]))


@pytest.mark.parametrize("name", MODULES)
def test_training_passes_in_a_batch_are_refused(name: str) -> None:
    module = made(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    expected = "VectorQuantizer: vmap cannot batch a pass that moves the codebook; call eval() or freeze the codebook"
    with pytest.raises(UnavailableError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        vmap(lambda x: module(x).quantized)(normal(BATCH, 7, 4, dtype=F64))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", MODULES)
def test_training_passes_under_a_single_gradient_move_as_ever(name: str) -> None:
    module, twin = made(name), made(name)
    x, tangent = normal(7, 4, dtype=F64), normal(7, 4, seed=2, dtype=F64)
    want = gradients(twin, x)
    torch.testing.assert_close(grad(lambda x: loss_of(module, x))(x), want[0])
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))
    want = gradients(twin, x)
    slope = jvp(lambda x: loss_of(module, x), (x,), (tangent,))[1]
    torch.testing.assert_close(slope, (want[0] * tangent).sum())
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))


def test_gradients_of_an_autoencoder_for_each_image() -> None:
    torch.manual_seed(0)
    model = VQVAE2.from_preset("digits").eval()
    images = normal(2, 1, model.config.in_channels, 16, 16)
    parameters, state = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        out = functional_call(model, {**parameters, **state}, (images,))
        return (out.reconstruction - images).square().mean() + out.commitment_loss

    found = vmap(grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        want = torch.autograd.grad(loss(parameters, image), list(parameters.values()), allow_unused=True)
        for value, expected in zip(found.values(), want, strict=True):
            torch.testing.assert_close(value[i], torch.zeros_like(value[i]) if expected is None else expected)


def test_gradients_of_a_prior_for_each_sample() -> None:
    torch.manual_seed(0)
    prior = snail().double()
    codes = torch.randint(5, (2, 1, 3, 4), generator=torch.Generator().manual_seed(0))
    parameters = dict(prior.named_parameters())

    def loss(parameters: dict[str, Tensor], codes: Tensor) -> Tensor:
        return functional_call(prior, parameters, (codes,)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, codes)
    tangents = {name: normal(*value.shape, dtype=F64) for name, value in parameters.items()}
    for i, one in enumerate(codes):
        want = torch.autograd.grad(loss(parameters, one), list(parameters.values()), allow_unused=True)
        slope = torch.zeros((), dtype=F64)
        for (name, value), expected in zip(found.items(), want, strict=True):
            torch.testing.assert_close(value[i], torch.zeros_like(value[i]) if expected is None else expected)
            slope = slope + (value[i] * tangents[name]).sum()
        plain = {name: value.detach() for name, value in parameters.items()}
        torch.testing.assert_close(jvp(lambda p, c=one: loss(p, c), (plain,), (tangents,))[1], slope)


def operators() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    image, kernel, bias = normal(1, 2, 3, 4, dtype=F64), normal(4, 2, 3, 3, seed=1, dtype=F64), normal(4, dtype=F64)
    context, residual = normal(1, 4, 3, 4, seed=2, dtype=F64), normal(1, 2, 3, 4, seed=3, dtype=F64)
    query, key, value = (normal(1, 2, 5, 4, seed=seed, dtype=F64) for seed in range(3))
    fused: dict[str, Any] = {"activation": "elu", "gate": True, "mask": "inclusive", "form": "symmetric"}
    return {
        "convolution": (causal_conv2d, causal_conv2d_reference, [image, kernel, bias]),
        "fused": (
            lambda x, w, c, r: fused_causal_conv2d(x, w, context=c, residual=r, **fused),
            lambda x, w, c, r: fused_causal_conv2d_reference(x, w, context=c, residual=r, **fused),
            [image, kernel, context, residual],
        ),
        "attention": (causal_attention, causal_attention_reference, [query, key, value]),
        "attention-narrow": (causal_attention, causal_attention_reference, [query, key, value[..., :3].clone()]),
    }


@pytest.mark.parametrize("name", operators())
def test_causal_operators(name: str) -> None:
    operator, reference, inputs = operators()[name]
    places = tuple(range(len(inputs)))
    leaves = [value.clone().requires_grad_() for value in inputs]
    weight = normal(*operator(*inputs).shape, seed=8, dtype=F64)

    def weighted(*values: Tensor) -> Tensor:
        return (operator(*values) * weight).sum()

    want = torch.autograd.grad((reference(*leaves) * weight).sum(), leaves)
    torch.testing.assert_close(grad(weighted, places)(*inputs), want)
    torch.testing.assert_close(jacfwd(weighted, places)(*inputs), want)
    tangents = tuple(normal(*value.shape, seed=9, dtype=F64) for value in inputs)
    value, slope = jvp(operator, tuple(inputs), tangents)
    torch.testing.assert_close((value, slope), jvp(reference, tuple(inputs), tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(operator(*duals)).tangent, slope)
    batches = [torch.stack([value, 2 * value, -value]) for value in inputs]
    samples = [[batch[i] for batch in batches] for i in range(3)]
    torch.testing.assert_close(vmap(operator)(*batches), torch.stack([operator(*one) for one in samples]))
    each = vmap(grad(weighted, places))(*batches)
    for i, one in enumerate(samples):
        leaves = [value.clone().requires_grad_() for value in one]
        want = torch.autograd.grad((reference(*leaves) * weight).sum(), leaves)
        torch.testing.assert_close([value[i] for value in each], list(want))


def test_what_cannot_be_transformed_is_refused() -> None:
    image, kernel, query = normal(1, 2, 3, 4), normal(4, 2, 3, 3), normal(1, 2, 5, 4)
    with refuses(UnavailableError, "backend: 'triton' was asked for but cannot run causal_conv2d here: transforms of"):
        grad(lambda x: causal_conv2d(x, kernel, backend="triton").sum())(image)
    with refuses(UnavailableError, "backend: 'triton' was asked for but cannot run causal_attention here: transforms"):
        grad(lambda x: causal_attention(x, x, x, backend="triton").sum())(query)
    with refuses(UnavailableError, "dropout: expected 0 where transforms of torch.func or forward mode take derivativ"):
        jvp(lambda x: causal_attention(x, x, x, dropout=0.5), (query,), (query,))
    with refuses(UnavailableError, "ema_update: vmap cannot batch what moves in place"):
        tensors = (
            normal(BATCH, 6).abs(),
            normal(BATCH, 6, 4),
            torch.ones(BATCH, 6),
            normal(BATCH, 6, 4),
            normal(BATCH, 6, 4),
        )
        vmap(lambda *t: ema_update(*t, decay=0.9))(*tensors)
    with refuses(UnavailableError, "draw: vmap cannot batch it; logits may have any number of leading axes"):
        vmap(draw)(normal(BATCH, 7, 4), torch.rand(BATCH, 7))


def test_passes_under_transforms_are_not_remembered() -> None:
    quantizer = VectorQuantizer(6, 4, channels_last=True)
    before = buffers(quantizer)
    with torch.no_grad():
        vmap(lambda x: quantizer(x, freeze_codebook=True).quantized)(normal(BATCH, 7, 4))
    assert not quantizer._passes._passes
    assert same(buffers(quantizer), before)
