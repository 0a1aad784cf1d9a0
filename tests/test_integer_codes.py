"""Codes and labels of every integer type mean the same, the highest code of an unsigned type included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import refuses
from torch import Tensor

from fastvq import LFQ, VQVAE2, Pipeline, PixelSNAIL, ResidualVQ, VectorQuantizer, sample
from fastvq._check import INTEGER_DTYPES
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.ops import code_conv2d
from fastvq.ops.draw import draw_margin

# The highest code of the narrowest types.
COUNTS = {torch.int8: 128, torch.uint8: 256, torch.int16: 512, torch.uint16: 512}


def count_of(dtype: torch.dtype) -> int:
    return COUNTS.get(dtype, 512)


def vqvae(count: int) -> VQVAE2:
    return VQVAE2.from_preset("tiny", num_codes=count).eval()


def prior(count: int) -> PixelSNAIL:
    given: dict[str, Any] = {"num_codes": count, "condition_num_codes": (count,), "num_classes": 300}
    return PixelSNAIL.from_preset("tiny-bottom", **given).eval()


def calls(count: int) -> dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]]:
    """Functions of a conversion of codes, each given the highest codes there are."""
    top = torch.arange(4).view(1, 2, 2) + (count - 4)
    bottom, label = top.repeat(1, 2, 2), torch.tensor([count - 1]).clamp(max=299)
    quantizer, heads = VectorQuantizer(count, 4), VectorQuantizer(count, 4, heads=2)
    residual, decoder, model = ResidualVQ(2, count, 4), vqvae(count), prior(count)
    above = PixelSNAIL.from_preset("tiny-top", num_codes=count, num_classes=300).eval()
    pipeline = Pipeline(decoder, [above, model])
    known: dict[str, Any] = {"seed": 0, "mask": torch.eye(4, dtype=torch.bool)}
    table = torch.randn(2, count, 3)
    logits, uniforms = torch.randn(4, count), torch.full((4,), 0.5)
    return {
        "lookup": lambda to: quantizer.lookup(to(top)),
        "lookup-heads": lambda to: heads.lookup(to(top)),
        "bits-lookup": lambda to: LFQ((count - 1).bit_length()).lookup(to(top)),
        "residual-lookup": lambda to: residual.lookup(to(top)),
        "decode": lambda to: decoder.decode((to(top), to(bottom))),
        "preview": lambda to: decoder.preview([to(top)]),
        "logits": lambda to: model(to(bottom), to(top), to(label)),
        "nll": lambda to: model.nll(to(bottom), condition=to(top), label=to(label)),
        "sample": lambda to: sample(model, 1, condition=to(top), init_codes=to(bottom), label=to(label), **known),
        "upper-codes": lambda to: pipeline.sample(1, codes=[to(top)], label=to(label), seed=0).images,
        "code_conv2d": lambda to: code_conv2d(to(top), table, [(0, -1), (-1, 0)]),
        "draw_margin": lambda to: draw_margin(logits, uniforms, to(top).flatten()),
    }


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
@pytest.mark.parametrize("name", list(calls(8)))
@torch.no_grad()
def test_same_as_int64(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    call = calls(count_of(dtype))[name]
    torch.testing.assert_close(call(lambda codes: codes.to(dtype)), call(lambda codes: codes), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
def test_absent_codes_exist_in_signed_types_alone(dtype: torch.dtype) -> None:
    quantizer = VectorQuantizer(8, 4)
    codes = torch.tensor([[-1, 3]]).to(dtype)
    if dtype.is_signed:
        vectors = quantizer.lookup(codes)
        assert (vectors[..., 0] == 0).all()
        torch.testing.assert_close(vectors[0, :, 1], quantizer.embedding[3], rtol=0, atol=0)
    else:
        with refuses(ArgumentError, r"codes: values must lie in 0\.\.7, got "):
            quantizer.lookup(codes)


def test_codes_beyond_int64() -> None:
    codes = torch.full((1, 4, 4), 2**63 + 1, dtype=torch.uint64)
    with refuses(ArgumentError, r"codes: values must lie in 0\.\.15, got "):
        PixelSNAIL.from_preset("tiny-top", shape=(4, 4)).nll(codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    codes = torch.zeros(1, 2, 2, dtype=dtype)
    with refuses(ArgumentTypeError, f"codes: expected an integer tensor, got {dtype}"):
        VectorQuantizer(8, 4).lookup(codes)
    with refuses(ArgumentTypeError, f"codes: expected an integer tensor, got {dtype}"):
        PixelSNAIL.from_preset("tiny-top").nll(codes)
