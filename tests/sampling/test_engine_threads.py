"""The C++ engine beside other threads: the same codes, the interpreter free to go on, Ctrl-C heard within a row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_helpers import CACHED, needs_extension, request_of, spread
from grid_tables import Grid, Tables
from helpers import pixelcnn, snail

from fastvq.sampling import EngineOptions, sample
from fastvq.sampling.engines import fill

pytestmark = [pytest.mark.usefixtures("steady"), needs_extension]


@pytest.mark.parametrize("engine", CACHED)
def test_several_python_threads(engine: str) -> None:
    """One prior in several threads, with micro-batches of several sizes, beside another prior."""
    strict, cnn = spread(snail(channels=20, layers_per_block=2, shape=(5, 6))), spread(pixelcnn(shape=(5, 6)))
    jobs = [(prior, n, micro) for prior in (strict, cnn) for n, micro in ((5, 5), (6, 2), (4, 3), (7, 7))] * 2
    alone = [sample(prior, n, seed=i, micro_batch=micro, engine=engine) for i, (prior, n, micro) in enumerate(jobs)]

    def work(index: int) -> torch.Tensor:
        torch.set_num_threads(1)
        prior, n, micro = jobs[index]
        return sample(prior, n, seed=index, micro_batch=micro, engine=engine)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(work, range(len(jobs))))
    for found, wanted in zip(together, alone, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_threads_of_pytorch_stay_as_they_are(threads: int | None) -> None:
    prior = snail()
    for before in (1, 2):
        torch.set_num_threads(before)
        fill("cpu", prior, request_of(prior, 2, {}, seed=0), lambda *_: None, EngineOptions(threads=threads))
        assert torch.get_num_threads() == before
    inner = torch.get_num_interop_threads()
    sample(prior, 2, seed=1, engine="cpu")
    assert torch.get_num_interop_threads() == inner


def test_no_threads_are_left_over() -> None:
    prior = snail()
    request = request_of(prior, 2, {}, seed=0)
    fill("cpu", prior, request, lambda *_: None, EngineOptions(threads=4))
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("threads are counted in /proc")
    before = len(list(tasks.iterdir()))
    for _ in range(3):
        fill("cpu", prior, request, lambda *_: None, EngineOptions(threads=4))
    assert len(list(tasks.iterdir())) <= before


def test_other_python_threads_go_on_during_a_row() -> None:
    """The grid takes some tenths of a second; the other thread needs the interpreter every millisecond."""
    tables = Tables()
    tables.shape |= {"height": 1, "width": 4000, "kernels": "baseline"}
    plan, grid = tables.make(), Grid(tables, batch=8)
    turns = 0
    done = threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0.001)

    other = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    # Were the interpreter not released, the other thread would have to wait this long to be given it.
    sys.setswitchinterval(1000)
    try:
        other.start()
        while not turns:
            time.sleep(0.001)
        turns = 0
        assert grid.run(plan) is None
        seen = turns
    finally:
        sys.setswitchinterval(interval)
        done.set()
        other.join()
    assert seen > 10


INTERRUPTED = """
import sys
sys.path.insert(0, {folder!r})
import torch
from engine_helpers import request_of
from helpers import snail
from fastvq.sampling import EngineOptions, sample
from fastvq.sampling.engines import fill
from fastvq.sampling.engines.cpu import CpuPlan

torch.set_num_threads(1)
torch.manual_seed(0)
small = snail()
wanted = sample(small, 2, seed=1, engine="cpu")
# Nearly all of the work is in the step phase, and the row would take half a minute.
wide = {{"shape": (1, 2048), "channels": 512, "residual_channels": 1024}}
prior = snail(layers_per_block=0, attention=False, output_blocks=6, **wide)
fill_grids = CpuPlan.fill


def announce(*given, **options):
    print("begin", flush=True)
    return fill_grids(*given, **options)


CpuPlan.fill = announce
rows = []
try:
    options = EngineOptions(threads={threads}, kernels="baseline")
    fill("cpu", prior, request_of(prior, 8, {{}}, seed=0), lambda count, _: rows.append(count), options)
except KeyboardInterrupt:
    print("interrupted after", len(rows), "rows", flush=True)
CpuPlan.fill = fill_grids
assert torch.equal(sample(small, 2, seed=1, engine="cpu"), wanted)
print("sampled again", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_within_a_row(threads: int) -> None:
    program = INTERRUPTED.format(folder=str(Path(__file__).parents[1]), threads=threads)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "begin\n"
            time.sleep(0.3)  # from the announcement into the extension
            child.send_signal(signal.SIGINT)
            rest, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert rest == "interrupted after 0 rows\nsampled again\n"
    assert child.returncode == 0
