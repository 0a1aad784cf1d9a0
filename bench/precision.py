"""What bfloat16 weights change: ``python -m bench.precision --out bench/results/precision``.

Logits of the cpu engine for the same grids, drawn in float32, from weights of either precision: the difference of the
negative log-likelihood, the divergence KL(float32 || bfloat16) per position, and how far the frequencies of codes,
averaged over all positions, lie apart (total variation).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.cases import SAMPLER_CASES, SamplerCase
from bench.engines import cpu_logits, request_of
from bench.files import free_path
from bench.machine import describe_commit, describe_machine, describe_versions, now
from fastvq import sample

CASES = ("digits-top-b32", "digits-bottom-b32", "small-strict-bottom-b32", "small-inclusive-bottom-b32")
MOST_POSITIONS = 1 << 14


def measure(case: SamplerCase, samples: int) -> dict[str, Any]:
    """Of ``samples`` grids. Digits are a trained prior, the others have random weights."""
    prior = case.prior()
    shape = prior.config.shape
    sums = {"nll": 0.0, "nll_difference": 0.0, "kl": 0.0}
    largest, frequencies = 0.0, torch.zeros(2, prior.config.num_codes, dtype=torch.float64)
    for start in range(0, samples, case.batch):
        inputs = {**case.inputs(prior), "seed": start}
        codes = sample(prior, case.batch, **inputs, engine="cpu")
        request = request_of(prior, case.batch, inputs, init_codes=codes, mask=torch.ones_like(codes, dtype=torch.bool))
        exact, near = (cpu_logits(prior, request, bf16=bf16).double().log_softmax(-1) for bf16 in (False, True))
        own = codes.unsqueeze(-1)
        divergence = (exact.exp() * (exact - near)).sum(-1)
        sums["nll"] -= float(exact.gather(-1, own).sum())
        sums["nll_difference"] += float((exact - near).gather(-1, own).sum())
        sums["kl"] += float(divergence.sum())
        largest = max(largest, float(divergence.max()))
        frequencies += torch.stack([logits.exp().sum((0, 1, 2)) for logits in (exact, near)])
    positions = samples * shape[0] * shape[1]
    means = {name: total / positions for name, total in sums.items()}
    apart = float((frequencies[0] - frequencies[1]).abs().sum() / 2 / positions)
    return {"prior": case.name, "positions": positions, **means, "largest_kl": largest, "total_variation": apart}


def main() -> None:
    """Print a line for each prior, and write all to a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    folder = parser.parse_args().out
    known = {case.id: case for case in SAMPLER_CASES}
    found = []
    for name in CASES:
        case = known[name]
        height, width = case.prior().config.shape
        found.append(measure(case, max(2, MOST_POSITIONS // (height * width * case.batch)) * case.batch))
        print(json.dumps(found[-1]), flush=True)
    source = {"date": now(), "machine": describe_machine(), "versions": describe_versions(), **describe_commit()}
    path = free_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**source, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
