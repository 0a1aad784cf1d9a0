"""In a child of fork, where the threads of its parent's OpenMP runtime are missing, compiled operations still work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_helpers import needs_extension

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"), needs_extension]

# The child exits with 0 if it gets what the parent got.
PROGRAM = """
import os, sys
sys.path.insert(0, {folder!r})
import numpy as np
import torch
import fastvq
from helpers import snail

torch.set_num_threads(2)
torch.manual_seed(0)
x, codebook = torch.randn(20_000, 64), torch.randn(300, 64)
# Made before the fork: PyTorch copies and fills tensors of this size in several threads.
digits = fastvq.Pipeline.from_pretrained("digits")
prior = snail(shape=(2, 8), channels=64, residual_channels=64)
quantizer = fastvq.VectorQuantizer(4000, 8, channels_last=True).eval().requires_grad_(False)
sums = torch.randn(4096, 64)
averages = [(torch.ones(4096), sums.clone(), sums.clone()) for _ in range(2)]


def nearest_code():
    return [fastvq.ops.nearest_code(x, codebook)]


def nearest_code_statistics():
    return list(fastvq.ops.nearest_code_statistics(x, codebook))


def ema_update():
    moved = averages.pop()
    fastvq.ops.ema_update(torch.full((4096,), 7), sums, *moved, decay=0.5, backend="cpp")
    return list(moved)


def quantize():
    return list(quantizer(x[:500, :8])[:2])


def sample():
    return [fastvq.sample(prior, 40, seed=1, micro_batch=40, engine="cpu")]


def several_threads():
    options = fastvq.EngineOptions(threads=2)
    return [fastvq.sample(prior, 40, seed=1, micro_batch=40, engine="cpu", options=options)]


def pipeline():
    found = digits.sample(64, label=3, seed=1, engine="cpu")
    return [*found.codes, found.images]


def compute():
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    found = [value.numpy() for value in {work}() if value is not None]
    assert torch.get_num_threads() == threads
    return found


def start_pool():
    a = torch.randn(600, 600)
    (a @ a).relu_()
    torch.nn.functional.conv2d(torch.randn(8, 32, 32, 32), torch.randn(32, 32, 3, 3))


if {early}:
    start_pool()
    wanted = compute()
else:
    # The extension is loaded in the child; here PyTorch alone uses threads.
    start_pool()
    wanted = None
    assert "fastvq._ext" not in sys.modules

for _ in range({generations}):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
found = compute()
if wanted is not None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        if one.dtype == np.float32:
            # PyTorch's sums depend on how many threads share them.
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, other)
sys.stdout.write("the same")
sys.stdout.flush()
os._exit(0)
"""


def run(work: str, *, early: bool = True, generations: int = 1) -> None:
    program = PROGRAM.format(folder=str(Path(__file__).parent), work=work, early=early, generations=generations)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, error = process.communicate(timeout=100)
        finally:
            if process.poll() is None:
                # A child that waits forever holds the pipes open.
                os.killpg(process.pid, 9)
    assert process.returncode == 0, error
    assert said == "the same"


@pytest.mark.parametrize(
    "work",
    ["nearest_code", "nearest_code_statistics", "ema_update", "quantize", "sample", "several_threads", "pipeline"],
)
def test_a_child_computes_what_its_parent_did(work: str) -> None:
    run(work)


@pytest.mark.parametrize("work", ["nearest_code", "sample"])
def test_the_extension_is_first_loaded_in_the_child(work: str) -> None:
    run(work, early=False)


def test_a_child_of_a_child() -> None:
    run("nearest_code", generations=2)
