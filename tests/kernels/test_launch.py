"""Launching what was compiled for the same arguments, with a stand-in for a kernel and for the GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_helpers import needs_triton

from fastvq.kernels import launch as module
from fastvq.kernels.launch import launch

pytestmark = needs_triton
Calls = list[tuple[Any, ...]]


class Compiled:
    function, packed_metadata = 11, (4, 1)

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def run(self, *args: Any) -> None:
        self.calls.append(("compiled", *args))


class Kernel:
    """Compiles with every call that is its own."""

    arg_names = ("x_ptr", "y_ptr", "length", "KIND", "BLOCK")

    def __init__(self) -> None:
        self.calls: Calls = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*args: Any, **options: Any) -> Compiled:
            self.calls.append(("kernel", grid, args, options))
            return Compiled(self.calls)

        return run


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5 + device, raising=False)
    monkeypatch.setattr(module, "_compiled", {})


GPU, GRID = torch.device("cuda", 0), (2, 3, 1)
OPTIONS = {"BLOCK": 64, "KIND": True, "num_warps": 4}


def test_the_same_arguments_launch_what_was_compiled() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    for grid in (GRID, (5, 1, 1)):
        launch(kernel, grid, GPU, (x, None), (7,), **OPTIONS)
    (first, *given), (second, *repeated) = kernel.calls
    assert first == "kernel"
    assert given == [GRID, (x, None, 7), OPTIONS]
    # Grid, stream, function, metadata, no hooks, and constants in the order of the kernel's parameters.
    assert second == "compiled"
    assert repeated == [5, 1, 1, 5, 11, (4, 1), None, None, None, x.data_ptr(), None, 7, True, 64]


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": (torch.zeros(8), torch.zeros(8))},
        {"tensors": (torch.zeros(8, dtype=torch.float16), None)},
        {"tensors": (torch.zeros(8)[1:], None)},
        {"numbers": (1,)},
        {"options": {**OPTIONS, "BLOCK": 32}},
        {"options": {**OPTIONS, "num_warps": 8}},
    ],
    ids=["tensor-for-none", "dtype", "alignment", "number", "constant", "warps"],
)
def test_others_are_compiled_anew(change: dict[str, Any]) -> None:
    kernel = Kernel()
    call = {"tensors": (torch.zeros(8), None), "numbers": (7,), "options": OPTIONS}
    for given in (call, {**call, **change}, call):
        launch(kernel, GRID, GPU, given["tensors"], given["numbers"], **given["options"])
    assert [name for name, *_ in kernel.calls] == ["kernel", "kernel", "compiled"]


def test_two_kernels_and_devices_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        launch(kernel, GRID, GPU, (None, None), (7,), **OPTIONS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(kernels[0], GRID, torch.device("cuda", 1), (None, None), (7,), **OPTIONS)
    assert [[name for name, *_ in kernel.calls] for kernel in kernels] == [["kernel", "kernel"], ["kernel"]]


def test_a_profiler_hears_of_launches() -> None:
    from triton import knobs

    kernel = Kernel()

    def hook(metadata: Any) -> None:
        raise AssertionError("Triton calls it, and there is none")

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            launch(kernel, GRID, GPU, (None, None), (7,), **OPTIONS)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    launch(kernel, GRID, GPU, (None, None), (7,), **OPTIONS)
    assert [name for name, *_ in kernel.calls] == ["kernel", "kernel", "compiled"]


@pytest.mark.parametrize("place", ["run", "function", "packed_metadata", "launch_metadata"])
def test_triton_launches_what_is_taken_from_it(place: str) -> None:
    """Its own launch names them; another version may not."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    source = inspect.getsource(JITFunction.run)
    call = "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,"
    assert f"kernel.{place}" in source
    assert call in " ".join(source.split())
    assert "packed_metadata" in inspect.getsource(CompiledKernel)


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_COMPILED", 3)
    kernel = Kernel()
    for number in range(10):
        launch(kernel, GRID, GPU, (None, None), (number,), **OPTIONS)
        assert len(module._compiled) <= 3


def test_elsewhere_the_kernel_is_called() -> None:
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, GRID, torch.device("cpu"), (None, None), (7,), **OPTIONS)
    assert [name for name, *_ in kernel.calls] == ["kernel", "kernel"]
