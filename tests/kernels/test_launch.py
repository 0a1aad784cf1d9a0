"""Launches that Triton is asked about once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastvq.kernels.launch import Launcher, form

Call = tuple[Any, ...]


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
    return Launcher(kernel, (3, 2), (7, 0.5), {"num_warps": 4, "BLOCK": 16})


def test_triton_is_asked_once() -> None:
    kernel = Kernel()
    launch, x, y = launcher(kernel), torch.empty(8), torch.empty(8)
    launch(x, None)
    assert kernel.asked == [((3, 2, 1), (x, None, 7, 0.5), {"num_warps": 4, "BLOCK": 16})]
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
