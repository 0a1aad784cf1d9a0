"""Named ranges for profilers: what is inside what to a tool that listens, and nothing where none does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvq import _nvtx

HERE = Path(__file__).parent
needs_listener = pytest.mark.skipif(
    shutil.which("nvcc") is None or importlib.util.find_spec("nvtx") is None,
    reason="nvcc, which comes with the headers of NVTX, or the package nvtx is missing",
)


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("nvtx") / "listener.so"
    options = ["-shared", "-cudart=none", "-Xcompiler=-fPIC"]
    subprocess.run(["nvcc", *options, str(HERE / "nvtx_listener.cpp"), "-o", str(library)], check=True)
    return library


def ranges(listener: Path, folder: Path, code: str) -> list[str]:
    """Ranges of our domain, each by its path from the outermost, in the order in which they open; repeats once."""
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(listener), "NVTX_SEEN": str(folder / "seen")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, check=True)
    opened: list[str] = []
    paths: dict[str, None] = {}
    for line in (folder / "seen").read_text().splitlines():
        if not line[1:].startswith("fastvq"):
            continue
        if line[0] == "-":
            opened.pop()
        else:
            opened.append(line.removeprefix("+fastvq:"))
            paths["/".join(opened)] = None
    assert opened == []
    return list(paths)


@needs_listener
def test_sampling_is_in_ranges(listener: Path, tmp_path: Path) -> None:
    code = """
import torch
from fastvq import sample
from fastvq.models import preset
model, config = preset("tiny-top")
sample(model(config), 1, seed=0, engine="cpu")
"""
    assert ranges(listener, tmp_path, code) == ["sample", "sample/grid"]


@needs_listener
def test_training_and_extraction_are_in_ranges(listener: Path, tmp_path: Path) -> None:
    code = """
import numpy as np
from fastvq.data import Digits, extract_codes
from fastvq.models import preset
from fastvq.training import TrainConfig, train_vqvae
data = Digits(16)
_, config = preset("tiny")
trained = train_vqvae(data, config, TrainConfig(steps=2, batch_size=4, validation_fraction=0.01), "run")
extract_codes(trained, data, np.arange(4), "codes")
"""
    found = ranges(listener, tmp_path, code)
    assert {"load", "forward", "backward", "step", "validate"} <= set(found)
    assert {"extract_codes", "extract_codes/load", "extract_codes/encode"} <= set(found)


def test_without_a_listener_ranges_are_nothing() -> None:
    def function() -> None: ...

    found = _nvtx.annotate("name")
    assert found(function) is function
    assert found is _nvtx.annotate("name")
    with found, found:
        pass


def test_without_the_package_ranges_are_nothing() -> None:
    code = """
import sys
sys.modules["nvtx"] = None
from fastvq._nvtx import annotate
assert annotate("name")(len) is len
with annotate("name"):
    print("inside")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "inside\n"
