"""Peak memory of one case in a fresh process: ``python -m bench.memory CASE [PEER] [--small]``.

Prints ``{"measured": ..., "predicted": ...}``. Of a sampler's case: the peak of resident bytes of the ``cpu`` engine
above those with the prior built and the libraries warm, and what :func:`fastvq.sampling.describe` says. Of a case of
nearest code: that of the peer above those with inputs and codebook, and no prediction.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import bench.peers  # noqa: F401
from bench.cases import NearestCodeCase, SamplerCase, case_of
from bench.engines import fill_rows, request_of
from bench.harness import return_freed_memory
from bench.nearest_code import NearestCode
from bench.registry import contender
from bench.training import TRAINING, TrainingCase
from fastvq import PixelSNAIL, sample
from fastvq.sampling import describe

# Memory that nobody has written to is not resident; after so many rows all that is kept has been.
_ROWS = 32


def sampler_memory(case: SamplerCase) -> dict[str, int]:
    prior = case.prior()
    request = request_of(prior, case.batch, case.inputs(prior))
    warm = PixelSNAIL.from_preset("tiny-bottom").eval()
    condition = torch.zeros((2, *warm.config.condition_shapes[0]), dtype=torch.int64)
    sample(warm, 2, condition=condition, seed=0, micro_batch=2, engine="cpu")
    before = _start()
    fill_rows("cpu", prior, request, _ROWS)
    return {"measured": _resident("VmHWM") - before, "predicted": describe(prior).memory(case.batch)}


def nearest_code_memory(case: NearestCodeCase, peer: str) -> dict[str, int | None]:
    warm = _contender(case.small(), peer)
    warm.prepare()
    warm.run()
    one = _contender(case, peer)
    one.prepare()
    before = _start()
    one.run()
    return {"measured": _resident("VmHWM") - before, "predicted": None}


def training_memory(case: TrainingCase) -> dict[str, int]:
    peaks: list[int] = []
    case.warmth().train(lambda: None)
    before = _start()
    case.train(lambda: peaks.append(_resident("VmHWM")))
    return {"measured": peaks[-1] - before, "predicted": case.predicted}


def _contender(case: NearestCodeCase, peer: str) -> Any:
    return contender(NearestCode(case, tuned=False, inputs=1), peer)


def _start() -> int:
    """Resident bytes now; the high-water mark becomes that of what follows, whatever preparing it took."""
    # Otherwise a run would fill what its preparation has left, and seem to need less.
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def main(arguments: list[str]) -> None:
    case_id, *peer = (argument for argument in arguments if argument != "--small")
    training = next((one for one in TRAINING if one.id == case_id), None)
    if training is not None:
        print(json.dumps(training_memory(training)))
        return
    case = case_of(case_id)
    case = case.small() if "--small" in arguments else case
    print(json.dumps(sampler_memory(case) if isinstance(case, SamplerCase) else nearest_code_memory(case, *peer)))


if __name__ == "__main__":
    main(sys.argv[1:])
