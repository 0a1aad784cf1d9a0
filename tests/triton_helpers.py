"""Running Triton kernels without a GPU: in the interpreter, and through the compiler to machine code.

Triton decides at import whether kernels are interpreted, so checks run in processes of their own
(`assert_interpreted`), while kernels are compiled in this one (`compile_kernel`), where the interpreter must be off.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from quick_interpreter import quicken
from torch import Tensor

# A check raises AssertionError, or returns a line worth reading.
Check = Callable[[str], str | None]
Groups = Mapping[str, Mapping[str, Check]]
Test = TypeVar("Test", bound=Callable[..., None])

# Bytes of shared memory that one program can have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it comes with fastvq[test] on Linux)"
)
needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled"
)


def needs_gpu(test: Test) -> Test:
    """A test that ``pytest -m gpu`` chooses, and that is skipped where there is no GPU."""
    import torch

    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is available")(test))


def names(groups: Groups) -> list[Any]:
    """Parameters (group, name) of every check, with readable ids."""
    return [pytest.param(group, name, id=f"{group}-{name}") for group, checks in groups.items() for name in checks]


def assert_interpreted(file: str, group: str, name: str) -> None:
    """Asserts that a check passes in the interpreter; the checks of a group share one process.

    Args:
        file: the test file; run as a script it calls `serve`.
        group, name: as in that file's groups.
    """
    result = _interpreted(file, group)[name]
    assert result["error"] is None, result["error"]
    if result["said"]:
        print(result["said"])


def checked_in_both(file: str, groups: Groups) -> tuple[Callable[[str, str], None], Callable[[str, str], None]]:
    """What a test file calls ``test_interpreted`` and ``test_on_a_gpu``: every check of its groups, in both places."""
    every = pytest.mark.parametrize(("group", "name"), names(groups))

    @needs_triton
    @every
    def test_interpreted(group: str, name: str) -> None:
        assert_interpreted(file, group, name)

    @needs_triton
    @needs_gpu
    @every
    def test_on_a_gpu(group: str, name: str) -> None:
        said = groups[group][name]("cuda")
        if said:
            print(said)

    return test_interpreted, test_on_a_gpu


@functools.cache
def _interpreted(file: str, group: str) -> dict[str, dict[str, str | None]]:
    with tempfile.TemporaryDirectory(prefix="fastvq-interpreted-") as folder:
        results, said = Path(folder) / "results.json", Path(folder) / "said"
        process = _forks().Process(target=_run_script, args=(file, [group, str(results)], str(said)))
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode == 0, f"{process.exitcode}: {said.read_text() if said.exists() else ''}"
        found: dict[str, dict[str, str | None]] = json.loads(results.read_text())
        return found


@functools.cache
def _forks() -> ForkServerContext:
    """Processes that interpret kernels, forked from one that has imported what all of them need: that takes longer than
    many checks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triton.language", "fastvq.models", "fastvq.sampling"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        # One thread: products this small only wait for each other.
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("OPENBLAS_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _run_script(file: str, arguments: list[str], said: str) -> None:
    with open(said, "w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    sys.argv = [file, *arguments]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


def serve(groups: Groups) -> None:
    """What a test file does when run as a script: the checks of one group, results to a file."""
    quicken()
    group, path = sys.argv[1:]
    results = {}
    for name, check in groups[group].items():
        error = said = None
        try:
            said = check("cpu")
        except Exception:
            error = traceback.format_exc()
        results[name] = {"error": error, "said": said}
    Path(path).write_text(json.dumps(results))


class Resources(NamedTuple):
    """What a compiled kernel takes: bytes of shared memory; registers and bytes of stack of a thread. And its code."""

    shared: int
    registers: int
    stack: int
    ptx: str
    ttgir: str


def compile_kernel(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int = 3,
    divisible: tuple[str, ...] = (),
    floats: tuple[str, ...] = (),
    registers: int | None = None,
) -> Resources:
    """Compiles a kernel to machine code for a compute capability such as 90; needs no GPU.

    Args:
        kernel: a function under ``triton.jit``.
        capability: 80, 90 or 100.
        types: Triton's name of the element type of every pointer argument, such as ``"fp32"``. Other arguments that
            are no constants are 32-bit integers, or float32 if they are among ``floats``.
        constants: values of the constexpr arguments.
        warps, stages: launch options.
        divisible: integer arguments that are multiples of 16, as pointers always are.
        registers: what a thread may have at most.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unknown = {*types, *constants, *divisible, *floats} - set(kernel.arg_names)
    assert not unknown, f"{kernel.__name__} has no {unknown}"
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(floats, "fp32")
    signature |= {name: f"*{element}" for name, element in types.items()} | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(kernel.arg_names) if name in types or name in divisible]
    source = ASTSource(kernel, signature, dict(constants), {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report.stdout)
    assert found, report.stdout
    # Spilled registers live on the stack.
    registers, stack, local = (int(number) for number in found.groups())
    return Resources(compiled.metadata.shared, registers, stack + local, compiled.asm["ptx"], compiled.asm["ttgir"])


class Recorder:
    """Stands for a kernel and notes what it would be launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, capability: int) -> Resources:
        """As Triton would: None and 1 are constants, and multiples of 16 are known to be such."""
        options = dict(self.options)
        warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
        named = dict(zip(self.kernel.arg_names, self.args, strict=False))
        types = {name: _elements(value) for name, value in named.items() if isinstance(value, Tensor)}
        constants = {
            name: value for name, value in named.items() if value is None or (isinstance(value, int) and value == 1)
        }
        rest = {name: value for name, value in named.items() if name not in types and name not in constants}
        floats = tuple(name for name, value in rest.items() if isinstance(value, float))
        divisible = tuple(name for name, value in rest.items() if name not in floats and value % 16 == 0)
        options.pop("enable_fp_fusion", None)
        numbers = {"warps": warps, "stages": stages, "registers": options.pop("maxnreg", None)}
        constants.update(options)
        return compile_kernel(
            self.kernel, capability, types, constants, **numbers, divisible=divisible, floats=floats
        )  # fmt: skip


def _elements(tensor: Tensor) -> str:
    """Triton's name of what a tensor holds."""
    import torch

    names = {torch.bool: "i1", torch.int32: "i32", torch.int64: "i64", torch.float32: "fp32"}
    names |= {torch.uint8: "u8", torch.float64: "fp64"}
    return {**names, torch.bfloat16: "bf16", torch.float16: "fp16"}[tensor.dtype]


def assert_fits(resources: Resources, capability: int) -> None:
    """Asserts that a program's shared memory exists and that no register is spilled."""
    assert resources.shared <= SHARED_MEMORY[capability]
    assert resources.stack == 0, f"{resources.stack} bytes of stack with {resources.registers} registers"


def assert_read_before_written(resources: Resources, element: str) -> None:
    """Asserts that a barrier lies between loads and later stores of an element type such as ``"f32"``.

    A small block is held by several warps; where one of them writes in place, the others must have read.
    """
    pattern = (
        rf"(?P<load>tt\.load .*!tt\.ptr<{element}>)|(?P<barrier>\.barrier)|(?P<store>tt\.store .*!tt\.ptr<{element}>)"
    )
    events = [found.lastgroup for found in re.finditer(pattern, resources.ttgir)]
    stores = [place for place, event in enumerate(events) if event == "store"]
    assert stores
    for place in stores:
        before = [event for event in events[:place] if event != "store"]
        assert before[-1] == "barrier"
