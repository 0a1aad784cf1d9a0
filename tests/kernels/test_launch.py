"""Launches that Triton is asked about once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvq.kernels import launch as module
from fastvq.kernels.launch import Launcher, form, launch

Call = tuple[Any, ...]
GPU, GRID = torch.device("cuda", 0), (3, 2, 1)
OPTIONS = {"num_warps": 4, "BLOCK": 16}


class Kernel:
    """Notes what it is launched with, and what is launched of what it has compiled."""

    arg_names = ("x_ptr", "y_ptr", "size", "scale", "BLOCK")

    def __init__(self, compiles: bool = True) -> None:
        self.asked: list[Call] = []
        self.launched: list[Call] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.asked.append((grid, args, options))
            return Compiled(self) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.kernel.launched.append((grid, args))


def launcher(kernel: Kernel) -> Launcher:
    return Launcher(kernel, (3, 2), (7, 0.5), OPTIONS)


def test_triton_is_asked_once() -> None:
    kernel = Kernel()
    launch, x, y = launcher(kernel), torch.empty(8), torch.empty(8)
    launch(x, None)
    assert kernel.asked == [((3, 2, 1), (x, None, 7, 0.5), OPTIONS)]
    assert not kernel.launched
    launch(y, None)
    assert len(kernel.asked) == 1
    assert kernel.launched == [((3, 2, 1), (y.data_ptr(), None, 7, 0.5, 16))]


def test_another_alignment_is_another_form() -> None:
    kernel = Kernel()
    launch, x = launcher(kernel), torch.empty(8)
    odd = x[1:]
    for given in (odd, x, odd, x):
        launch(given, x)
    assert [call[1][0] is odd for call in kernel.asked] == [True, False, True]
    assert len(kernel.launched) == 1


def test_the_interpreter_is_asked_every_time() -> None:
    kernel = Kernel(compiles=False)
    launch, x = launcher(kernel), torch.empty(8)
    launch(x, x)
    launch(x, x)
    assert len(kernel.asked) == 2


def test_form() -> None:
    x = torch.empty(4, 6)
    assert form(x) == form(torch.zeros(4, 6))
    others = x.T, x[:, :3], x.half(), torch.empty(4, 6, device="meta"), x.view(6, 4)
    assert form(x) not in [form(other) for other in others]


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_launchers", {})


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    "change",
    [
        {"tensors": (torch.zeros(8, dtype=torch.float16), None)},
        {"tensors": (torch.zeros(8)[1:], None)},
        {"numbers": (1, 0)},
        {"grid": (3, 3, 1)},
        {"options": {**OPTIONS, "BLOCK": 32}},
        {"options": {**OPTIONS, "num_warps": 8}},
    ],
    ids=["dtype", "alignment", "number", "grid", "constant", "warps"],
)
def test_other_arguments_are_asked_about(change: dict[str, Any]) -> None:
    kernel = Kernel()
    call = {"grid": GRID, "tensors": (torch.zeros(8), None), "numbers": (7, 0), "options": OPTIONS}
    for given in (call, {**call, **change}, call):
        launch(kernel, given["grid"], GPU, given["tensors"], given["numbers"], **given["options"])
    assert len(kernel.asked) == 2
    assert [args[1:] for _, args in kernel.launched] == [(None, 7, 0, 16)]


@pytest.mark.usefixtures("one_gpu")
def test_kernels_and_devices_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        launch(kernel, GRID, GPU, (None, None), (7, 0), **OPTIONS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(kernels[0], GRID, torch.device("cuda", 1), (None, None), (7, 0), **OPTIONS)
    assert [len(kernel.asked) for kernel in kernels] == [2, 1]
    assert not kernels[0].launched


@pytest.mark.usefixtures("one_gpu")
def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_LAUNCHERS", 3)
    kernel = Kernel()
    for number in range(10):
        launch(kernel, GRID, GPU, (None, None), (number, 0), **OPTIONS)
        assert len(module._launchers) <= 3


def test_elsewhere_the_kernel_is_called() -> None:
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, GRID, torch.device("cpu"), (None, None), (7, 0), **OPTIONS)
    assert len(kernel.asked) == 2
