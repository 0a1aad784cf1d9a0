"""Samples the same grids in many ways, and counts positions at which the codes of the cpu engine differ.

``python -m tests.same_bits_runs --positions 1000000``: of each prior, default calls of 64 samples are compared with
calls of other n, starts, micro-batches, numbers of threads, instruction sets and tiles, chosen at random; and with
``--certified`` the naive model's own logits say whether codes are right. The status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.engines import request_of
from bench.sampler import check_codes
from fastvq import Pipeline, PixelSNAIL, sample
from fastvq.models import PixelSNAILConfig
from fastvq.models.prior import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines.cpu import require_kernels
from fastvq.sampling.plan import compile_plan

SAMPLES = 64
TOLD: dict[str, Any] = {
    "level": 1,
    "condition_shapes": ((8, 8),),
    "condition_num_codes": (512,),
    "num_classes": 10,
}


def snail(channels: int, layers: int, shape: tuple[int, int] = (16, 16), **changes: Any) -> Prior:
    torch.manual_seed(0)
    settings = {"residual_channels": channels, "condition_channels": channels, "blocks": 1, "kernel_size": 5}
    return PixelSNAIL(
        PixelSNAILConfig(
            shape=shape, num_codes=512, channels=channels, layers_per_block=layers, **{**TOLD, **settings, **changes}
        )
    ).eval()


PRIORS: dict[str, Callable[[], Prior]] = {
    "digits top, attention": lambda: Pipeline.from_pretrained("digits").priors[0],
    "digits bottom, attention": lambda: Pipeline.from_pretrained("digits").priors[1],
    "64 channels, strict": lambda: snail(64, 4, attention=False),
    "64 channels, inclusive": lambda: snail(64, 4, attention=False, mask="inclusive"),
    "64 channels, strict, 32 x 32": lambda: snail(64, 2, (32, 32), attention=False),
    "64 channels, inclusive, attention": lambda: snail(64, 2, mask="inclusive"),
    "256 channels, strict": lambda: snail(256, 2, attention=False),
    "256 channels, inclusive": lambda: snail(256, 1, attention=False, mask="inclusive"),
    "256 channels, strict, attention": lambda: snail(256, 1),
}


def inputs(prior: Prior, n: int, seed: int) -> dict[str, Any]:
    """Of n samples."""
    generator = torch.Generator().manual_seed(seed)
    config = prior.config
    grids = zip(config.condition_num_codes, config.condition_shapes, strict=True)
    condition = [torch.randint(count, (n, *shape), generator=generator) for count, shape in grids]
    label = None if config.num_classes is None else torch.arange(n) % config.num_classes
    return {"condition": condition or None, "label": label, "seed": seed}


def part(told: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    condition, label = told["condition"], told["label"]
    return {
        "condition": None if condition is None else [codes[start:stop] for codes in condition],
        "label": None if label is None else label[start:stop],
        "seed": told["seed"],
    }


def instruction_sets() -> list[str]:
    found = ["auto"]
    for name in ("avx2", "avx512"):
        try:
            require_kernels(name)
        except ValueError:
            continue
        found.append(name)
    return found


def another_way(prior: Prior, told: dict[str, Any], rng: random.Random, tiles: list[int | None]) -> tuple[int, Tensor]:
    """The first sample, and codes from it on."""
    n = rng.randint(1, SAMPLES)
    start = rng.randint(0, SAMPLES - n)
    options = EngineOptions(
        threads=rng.choice([1, 2, 3, 7]), tile=rng.choice(tiles), kernels=rng.choice(instruction_sets())
    )
    micro_batch = rng.choice([None, 1, 3, 8, n])
    given = part(told, start, start + n)
    return start, sample(prior, n, start=start, engine="cpu", micro_batch=micro_batch, options=options, **given)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.same_bits_runs", description=__doc__)
    parser.add_argument("--positions", type=int, default=1_000_000, help="compared, over all priors")
    parser.add_argument("--certified", type=int, default=0, help="positions checked against the naive model's logits")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    failed = False
    for name, make in PRIORS.items():
        prior, begun = make(), time.perf_counter()
        # Digits have few positions, and calls take their time: they have a smaller share.
        share = (1 if name.startswith("digits") else 6) / (6 * len(PRIORS) - 10)
        to_compare, to_certify = options.positions * share, options.certified * share
        width = prior.config.shape[1]
        tiles: list[int | None] = [None, width] if compile_plan(prior).skew is None else [None, 1, 2, 8, width]
        compared = different = certified = outside = calls = 0
        worst = float("inf")
        while compared < to_compare or certified < to_certify:
            told = inputs(prior, SAMPLES, rng.getrandbits(32))
            codes = sample(prior, SAMPLES, engine="cpu", **told)
            if certified < to_certify:
                check = check_codes(prior, request_of(prior, SAMPLES, told), codes)
                certified, outside = certified + codes.numel(), outside + check.facts["outside"]
                worst = min(worst, check.facts["worst_margin"])
                failed |= not check.passed
            for _ in range(6):
                if compared >= to_compare:
                    break
                start, found = another_way(prior, told, rng, tiles)
                compared, calls = compared + found.numel(), calls + 1
                different += int((found != codes[start : start + len(found)]).sum())
        failed |= different > 0
        facts = {"prior": name, "calls": calls, "positions": compared, "different": different}
        if certified:
            facts |= {"certified": certified, "outside": outside, "worst_margin": worst}
        print(json.dumps({**facts, "seconds": round(time.perf_counter() - begun, 1)}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
