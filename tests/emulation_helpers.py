"""The CUDA engine on an emulated device: its sources compiled for the host, and how tests launch them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from engine_helpers import request_of
from torch import Tensor

from fastvq.models import Prior
from fastvq.sampling.engines import static_inputs
from fastvq.sampling.engines.cuda_grid import CudaStep, sample_cuda
from fastvq.sampling.engines.state import CompiledPlan, GridState, RowState
from fastvq.sampling.plan import Plan, compile_plan
from fastvq.sampling.request import SampleRequest

_HERE = Path(__file__).parent
_DEVICE_HEADER = _HERE.parent / "csrc" / "cuda" / "device.h"


def _tool(name: str) -> str | None:
    """A program of this environment, or else one on the path."""
    folder = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([folder, os.environ.get("PATH", "")]))


def _folder() -> Path:
    """Where the module of these sources is built: once for all processes and runs that have the same."""
    settings = (sys.version, sys.executable, os.environ.get("CXX"), os.environ.get("CXXFLAGS"))
    digest = hashlib.sha256(repr(settings).encode())
    for path in sorted([*(_HERE.parent / "csrc").rglob("*.*"), *(_HERE / "emulation").rglob("*.*")]):
        digest.update(f"{path.relative_to(_HERE.parent)}\n".encode() + path.read_bytes())
    return Path(tempfile.gettempdir()) / f"fastvq-emulated-{os.getuid()}" / digest.hexdigest()[:24]


@functools.cache
def new_module() -> ModuleType:
    """Loaded once per process."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            cmake, ninja = _tool("cmake"), _tool("ninja")
            assert cmake is not None, "cmake: not found; it is among what the tests need (pip install fastvq[test])"
            configure = [cmake, "-S", _HERE / "emulation", "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
            if ninja is not None:
                configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            for command in (configure, [cmake, "--build", folder, "--target", "fastvq_emulated", "--parallel"]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
            (folder / "done").touch()
    path = next(folder.glob("fastvq_emulated*.so"))
    spec = importlib.util.spec_from_file_location("fastvq_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """Skips where nothing can be compiled; what does not compile is a failure."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}) to compile the kernels for the host with")
    return new_module()


@pytest.fixture
def emulated(emulated_module: ModuleType) -> Iterator[ModuleType]:
    """The device as it is at first, whatever other tests chose."""
    reset(emulated_module)
    yield emulated_module
    reset(emulated_module)


def sites() -> list[str]:
    """Names of the places at which threads of the kernels meet, in the order of their numbers."""
    text = _DEVICE_HEADER.read_text()
    body = re.search(r"enum class Site : int \{(.*?)\}", text, re.DOTALL)
    assert body is not None
    names = re.findall(r"\b(k\w+)\s*,", re.sub(r"//.*", "", body[1]))
    assert names[-1] == "kCount"
    return names[:-1]


def reset(module: ModuleType, **chosen: Any) -> None:
    """Choose what is given, and everything else as it is at first. ``disabled`` takes names of sites."""
    names = sites()
    chosen["disabled"] = {names.index(name) for name in chosen.get("disabled", ())}
    # More blocks can be resident than any test asks for.
    module.configure(**{"multiprocessors": 16, **chosen, "site_names": names})


class Emulated:
    """A prior packed for a number of samples on the emulated device.

    Args:
        blocks: of a launch.
        shared_limit: bytes of shared memory of a block; 0 for what the device offers.
        plan: what to run instead of the prior's own plan, of the same shape and number of codes.
    """

    def __init__(
        self,
        module: ModuleType,
        prior: Prior,
        batch: int,
        *,
        precision: str = "float32",
        blocks: int = 3,
        shared_limit: int = 0,
        plan: Plan | None = None,
    ) -> None:
        self.module, self.prior, self.batch = module, prior, batch
        self.compiled = CompiledPlan(plan or compile_plan(prior), torch.device("cpu"))
        self.step = CudaStep(
            self.compiled.plan,
            batch,
            torch.device("cpu"),
            precision=precision,
            blocks=blocks,
            shared_limit=shared_limit,
            extension=module,
        )

    def state(self, request: SampleRequest) -> RowState:
        return GridState(self.compiled, self.batch, static_inputs(self.prior, request))

    @torch.inference_mode()
    def fill(self, request: SampleRequest, *, logits: bool = False) -> tuple[Tensor, Tensor]:
        """Codes [B, H, W], and logits [B, H, W, K] of all positions: NaN where none were asked for."""
        config = self.prior.config
        found = torch.full((self.batch, *config.shape, config.num_codes), float("nan"))
        codes = sample_cuda(self.step, self.state(request), request, lambda *_: None, logits=found if logits else None)
        return codes.clone(), found

    def logits(self, codes: Tensor, given: dict[str, Any]) -> Tensor:
        """At every position of grids that are known beforehand."""
        everything = torch.ones_like(codes, dtype=torch.bool)
        request = request_of(self.prior, self.batch, given, seed=0, init_codes=codes, mask=everything)
        filled, found = self.fill(request, logits=True)
        assert torch.equal(filled, codes)
        return found


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors are NaN until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled
