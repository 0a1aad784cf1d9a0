"""Which precision float32 products take on a GPU: what PyTorch's switches say, read and restored without a trace.

Every check has a process of its own, since what was written once cannot be taken back; all begin as copies of one.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

START = """
import warnings
import torch
from fastvq._precision import full_float32, product_precision
warnings.simplefilter("error")
back = torch.backends
def found():
    return product_precision("convolution"), product_precision("attention")
def state():
    switches = (back.cudnn.conv, back.cudnn.rnn, back.cudnn, back.cuda.matmul, back)
    return [switch.fp32_precision for switch in switches]
"""
END = """
before = state()
with full_float32(torch.device("cuda")):
    assert found() == ("ieee", "ieee"), found()
assert state() == before, (state(), before)
with full_float32(torch.device("cpu")):
    assert state() == before
"""
# What the user writes, and the precision of convolutions and of attention.
SWITCHES = {
    "untouched": ("", ("tf32", "ieee")),
    "old": ("back.cudnn.allow_tf32 = False; back.cuda.matmul.allow_tf32 = True", ("ieee", "tf32")),
    "new": ("back.cudnn.conv.fp32_precision = 'ieee'; back.cuda.matmul.fp32_precision = 'tf32'", ("ieee", "tf32")),
    "mixed": ("back.cuda.matmul.allow_tf32 = True; back.cudnn.conv.fp32_precision = 'ieee'", ("ieee", "tf32")),
    "matmul-precision": ("torch.set_float32_matmul_precision('high')", ("tf32", "tf32")),
    "everything": ("back.fp32_precision = 'tf32'", ("tf32", "tf32")),
    "nothing": ("back.fp32_precision = 'ieee'", ("ieee", "ieee")),
}


READ = "values = back.cudnn.allow_tf32, back.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()\n"
SCRIPTS = {
    **{name: f"{line}\nassert found() == {wanted!r}, found()\n{END}" for name, (line, wanted) in SWITCHES.items()},
    **{
        f"{name}-read": f"{SWITCHES[name][0]}\n{READ}old = values\n{END}\n{READ}assert values == old, (values, old)"
        for name in ("untouched", "old", "matmul-precision")
    },
    "following": f"back.fp32_precision = 'tf32'\n{END}\nback.fp32_precision = 'ieee'\nassert found()[1] == 'ieee'",
}
COPIES = """
import json, os, sys, traceback
failed = {}
for name, script in json.load(sys.stdin).items():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            exec(script, globals())
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    failed[name] = os.read(reading, 1 << 16).decode()
print(json.dumps(failed))
"""


@functools.cache
def failures() -> dict[str, str]:
    """What each script failed with, "" where it did not."""
    command, scripts = [sys.executable, "-c", START + COPIES], json.dumps(SCRIPTS)
    done = subprocess.run(command, input=scripts, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_switches_decide_and_stay_as_they_were(name: str) -> None:
    assert failures()[name] == ""
