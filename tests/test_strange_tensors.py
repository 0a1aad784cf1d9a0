"""Tensors that no kernel can read, and floating-point types without arithmetic, are refused by name everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import refuses, snail
from quantizer_helpers import normal
from torch import Tensor

from fastvq.errors import ArgumentTypeError
from fastvq.models import FSQ, LFQ, VQVAE2, ResidualVQ, SimVQ, VectorQuantizer
from fastvq.models.classifier import Classifier, ClassifierConfig
from fastvq.ops import (
    causal_attention,
    causal_conv2d,
    draw,
    draw_margin,
    ema_update,
    fused_causal_conv2d,
    nearest_code,
    nearest_code_statistics,
)
from fastvq.ops.code_conv import code_conv2d

pytestmark = [
    pytest.mark.usefixtures("steady"),
    pytest.mark.filterwarnings("ignore:Sparse|.*prototype|.*deprecated|.*quantization"),
]


def float8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def float8_wide(x: Tensor) -> Tensor:
    return x.to(torch.float8_e5m2)


def coo(x: Tensor) -> Tensor:
    return x.to_sparse()


def csr(x: Tensor) -> Tensor:
    return x.to_sparse_csr()


def mkldnn(x: Tensor) -> Tensor:
    return x.to_mkldnn()


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x))


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


KINDS: dict[Callable[[Tensor], Tensor], str] = {
    float8: "expected float64, float32, bfloat16 or float16, got torch.float8_e4m3fn",
    float8_wide: "expected float64, float32, bfloat16 or float16, got torch.float8_e5m2",
    coo: "expected a dense tensor, got layout torch.sparse_coo",
    csr: "expected a dense tensor, got layout torch.sparse_csr",
    mkldnn: "expected a dense tensor, got layout torch._mkldnn",
    nested: "expected a dense tensor, got a nested one",
    jagged: "expected a dense tensor, got layout torch.jagged",
    quantized: "expected a floating-point tensor, got torch.qint8",
}


def calls() -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    """By operation and argument: a call and an argument that it takes."""
    rows, codes, counts = normal(5, 4), normal(6, 4), torch.ones(6)
    image, kernel, heads = normal(2, 3, 4, 4), normal(3, 3, 3, 3), normal(2, 2, 5, 4)
    quantizer = VectorQuantizer(6, 4, channels_last=True)
    residual = ResidualVQ(2, 6, 4, channels_last=True)
    autoencoder = VQVAE2.from_preset("digits").eval()
    images = normal(2, autoencoder.config.in_channels, 16, 16)
    classifier = Classifier(ClassifierConfig(num_classes=2, channels=(4,), features=4))
    update: dict[str, Tensor] = {
        "counts": counts,
        "sums": codes.clone(),
        "cluster_size": counts.clone(),
        "embedding_sum": codes.clone(),
        "embedding": codes.clone(),
    }
    uniforms = torch.rand(5)
    return {
        "nearest_code: x": (lambda t: nearest_code(t, codes), rows),
        "nearest_code: codebook": (lambda t: nearest_code(rows, t), codes),
        "nearest_code_statistics: x": (lambda t: nearest_code_statistics(t, codes), rows),
        "nearest_code_statistics: codebook": (lambda t: nearest_code_statistics(rows, t), codes),
        **{
            f"ema_update: {name}": (lambda t, name=name: ema_update(**{**update, name: t}, decay=0.9), update[name])
            for name in update
        },
        "draw: logits": (lambda t: draw(t, uniforms), rows),
        "draw_margin: logits": (lambda t: draw_margin(t, uniforms, torch.zeros(5, dtype=torch.int64)), rows),
        "causal_conv2d: x": (lambda t: causal_conv2d(t, kernel), image),
        "causal_conv2d: weight": (lambda t: causal_conv2d(image, t), kernel),
        "fused_causal_conv2d: bias": (lambda t: fused_causal_conv2d(image, kernel, t), normal(3)),
        "fused_causal_conv2d: context": (lambda t: fused_causal_conv2d(image, kernel, context=t), image),
        "fused_causal_conv2d: residual": (lambda t: fused_causal_conv2d(image, kernel, residual=t), image),
        "causal_attention: query": (lambda t: causal_attention(t, heads, heads), heads),
        "causal_attention: key": (lambda t: causal_attention(heads, t, heads), heads),
        "causal_attention: value": (lambda t: causal_attention(heads, heads, t), heads),
        "code_conv2d: table": (
            lambda t: code_conv2d(torch.zeros(1, 2, 2, dtype=torch.int64), t, [(0, -1)]),
            normal(1, 6, 4),
        ),
        "VectorQuantizer: x": (quantizer, rows),
        "encode: x": (quantizer.encode, rows),
        "ResidualVQ: x": (residual, rows),
        "VectorQuantizer between maps: x": (VectorQuantizer(6, 2, input_dim=4, channels_last=True), rows),
        "SimVQ: x": (SimVQ(6, 4, channels_last=True), rows),
        "FSQ: x": (FSQ((3, 4, 5, 6), channels_last=True), rows),
        "LFQ: x": (LFQ(4, channels_last=True), rows),
        "VQVAE2: images": (autoencoder, images),
        "VQVAE2.encode: images": (autoencoder.encode, images),
        "Classifier: images": (classifier, normal(2, 3, 8, 8)),
    }


CALLS = calls()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_is_refused_by_name(name: str, kind: Callable[[Tensor], Tensor]) -> None:
    call, usual = CALLS[name]
    try:
        strange = kind(usual)
    except (RuntimeError, ValueError, IndexError):
        pytest.skip(f"there is no {kind.__name__} of {usual.ndim} axes")
    with refuses(ArgumentTypeError, f"{name.split(': ')[1]}: {KINDS[kind]}"):
        call(strange)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_usual_is_taken(name: str) -> None:
    call, usual = CALLS[name]
    call(usual.clone())


def test_float8_on_both_sides() -> None:
    image, kernel, heads = float8(normal(1, 3, 4, 4)), float8(normal(3, 3, 3, 3)), float8(normal(1, 2, 5, 4))
    expected = KINDS[float8]
    with refuses(ArgumentTypeError, f"x: {expected}"):
        causal_conv2d(image, kernel)
    with refuses(ArgumentTypeError, f"query: {expected}"):
        causal_attention(heads, heads, heads)
    with refuses(ArgumentTypeError, f"x: {expected}"):
        nearest_code(heads[0], heads[0])


def test_a_codebook_that_was_converted_to_float8() -> None:
    quantizer = VectorQuantizer(6, 4, channels_last=True).to(torch.float8_e4m3fn).eval()
    with refuses(ArgumentTypeError, f"codebook: {KINDS[float8]}"):
        quantizer(normal(5, 4))


def test_masks_and_uniforms() -> None:
    mask = torch.tensor([True, False, True, True, True])
    for call in (
        lambda t: nearest_code_statistics(normal(5, 4), normal(6, 4), mask=t),
        lambda t: VectorQuantizer(6, 4, channels_last=True)(normal(5, 4), t),
        lambda t: ResidualVQ(2, 6, 4, channels_last=True)(normal(5, 4), t),
    ):
        with refuses(ArgumentTypeError, f"mask: {KINDS[coo]}"):
            call(mask.to_sparse())
    with refuses(ArgumentTypeError, f"uniforms: {KINDS[coo]}"):
        draw(normal(5, 4), torch.rand(5).to_sparse())
    with refuses(ArgumentTypeError, f"counts: {KINDS[coo]}"):
        whole = torch.ones(6, dtype=torch.int64).to_sparse()
        ema_update(whole, normal(6, 4), torch.ones(6), normal(6, 4), normal(6, 4), decay=0.9)


def test_a_prior_of_float8_is_refused() -> None:
    prior = snail()
    for parameter in prior.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentTypeError, match=KINDS[float8]):
        prior(torch.zeros(1, 3, 4, dtype=torch.int64))
