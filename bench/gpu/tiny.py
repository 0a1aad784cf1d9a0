"""A little of every GPU kernel, for a memory or race checker: ``python -m bench.gpu.tiny [--what engine|ops|all]``.

Tiny priors sampled by the ``cuda`` engine (float32, bfloat16 with and without matrix instructions, filtered draws,
in-painting), and the Triton operations forward and backward, each compared with PyTorch. Ends with `LAST_WORDS`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from fastvq import GatedPixelCNN, PixelSNAIL, sample
from fastvq.models import ResidualVQ, VectorQuantizer
from fastvq.models.prior import Prior
from fastvq.ops.causal_attention import causal_attention
from fastvq.ops.causal_conv import fused_causal_conv2d
from fastvq.ops.nearest_code import nearest_code_statistics

LAST_WORDS = "tiny: all of it has run"


def priors() -> dict[str, Prior]:
    """Attention, a condition on other codes, an inclusive mask, and a gated PixelCNN; odd grids."""
    torch.manual_seed(0)
    return {
        "strict-attention": PixelSNAIL.from_preset("tiny-top", shape=(3, 5), mask="strict").eval(),
        "inclusive": PixelSNAIL.from_preset("tiny-bottom", mask="inclusive").eval(),
        "pixelcnn": GatedPixelCNN.from_preset("tiny-pixelcnn").eval(),
    }


def sample_tiny(prior: Prior, batch: int, device: str, engine: str, options: dict[str, Any], compare: bool) -> None:
    """Sample with an engine, some codes being known; a float32 engine is to agree with the naive sampler."""
    prior, config = prior.to(device), prior.config
    grids = zip(config.condition_num_codes, config.condition_shapes, strict=True)
    codes, mask = torch.randint(config.num_codes, (batch, *config.shape)), torch.rand(batch, *config.shape) < 0.3
    given: dict[str, Any] = {
        "condition": [torch.randint(count, (batch, *shape)) for count, shape in grids] or None,
        "label": None if config.num_classes is None else torch.arange(batch) % config.num_classes,
        "init_codes": codes,
        "mask": mask,
        "seed": 1,
        "micro_batch": batch,
    }
    drawn = sample(prior, batch, **given, **options, engine=engine).cpu()
    assert torch.equal(drawn[mask], codes[mask])
    if compare and options["precision"] == "float32":
        # On so few codes a uniform number within rounding of a boundary would be a great coincidence.
        assert torch.equal(drawn, sample(prior, batch, **given, **options, engine="naive").cpu())


def run_engine(device: str, engine: str = "cuda", compare: bool = True) -> int:
    """The engine in every form; returns how many times something was sampled."""
    count = 0
    for name, prior in priors().items():
        for precision in ("float32", "bfloat16"):
            # Matrix instructions begin at 8 samples.
            for batch in (3, 9):
                for filters in ({}, {"temperature": 0.9, "top_k": 5, "top_p": 0.8}):
                    sample_tiny(prior, batch, device, engine, {"precision": precision, **filters}, compare)
                    count += 1
            print(f"{name}, {precision}", flush=True)
    return count


def run_ops(
    device: str, backend: str | None = "triton", convolutions: tuple[str | None, ...] = ("triton", "fused")
) -> int:
    """The operations forward and backward, and quantisers that update codebooks; returns how many."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    found = nearest_code_statistics(normal(77, 17), normal(13, 17), backend=backend)
    assert int(found.counts.sum()) == 77
    for quantizer in (VectorQuantizer(13, 17, channels_last=True), ResidualVQ(3, 13, 17, channels_last=True)):
        out = quantizer.to(device).train()(normal(77, 17).requires_grad_())
        assert bool(out.quantized.isfinite().all())
    count = 3
    masks = ("strict", "inclusive")
    for mask in masks:
        query, key, value = (normal(2, 2, 21, 16).requires_grad_() for _ in range(3))
        causal_attention(query, key, value, mask=mask, dropout=0.1, seed=1, backend=backend).square().sum().backward()
        inputs = [query, key, value]
        for convolution in convolutions:
            x, weight = normal(2, 16, 5, 7).requires_grad_(), normal(32, 32, 3, 3).requires_grad_()
            out = fused_causal_conv2d(x, weight, mask=mask, activation="concat_elu", gate=True, backend=convolution)
            out.square().sum().backward()
            inputs += [x, weight]
        for tensor in inputs:
            assert tensor.grad is not None
            assert bool(tensor.grad.isfinite().all())
        count += 1 + len(convolutions)
        print(f"operations, {mask}", flush=True)
    return count


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tiny", description=__doc__)
    parser.add_argument("--what", choices=("engine", "ops", "all"), default="all")
    parser.add_argument("--no-compare", action="store_true", help="leave out the naive sampler, most of the work")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    count = 0
    if options.what in ("engine", "all"):
        count += run_engine(options.device, compare=not options.no_compare)
    if options.what in ("ops", "all"):
        count += run_ops(options.device)
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls")
    print(LAST_WORDS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
