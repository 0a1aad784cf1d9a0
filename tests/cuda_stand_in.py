"""The interface of the extension's CUDA engine with the C++ engine behind it, for what Python does around it."""

from __future__ import annotations

import ctypes
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from engine_helpers import (
    given_to,
    request_of,
)
from torch import Tensor

from fastvq import _engine
from fastvq.models import Prior
from fastvq.sampling.engines import static_inputs
from fastvq.sampling.engines.cuda_grid import CudaStep, sample_cuda
from fastvq.sampling.engines.state import CompiledPlan, GridState
from fastvq.sampling.plan import compile_plan
from fastvq.sampling.request import SampleRequest

CPU = torch.device("cpu")
BATCH = 3


def numbers(address: int, *shape: int) -> np.ndarray:
    """The int64 array at an address."""
    kind = ctypes.c_int64 * int(np.prod(shape))
    return np.ctypeslib.as_array(kind.from_address(address)).reshape(shape)


class StandIn(types.ModuleType):
    """The extension's interface to the CUDA engine, with the C++ engine behind it and notes of what came."""

    def __init__(self) -> None:
        super().__init__("stand_in")
        self.made: list[tuple[Any, ...]] = []
        self.order: list[int] = []
        self.when_row: Callable[[int], None] = lambda row: None

    def make_cuda_plan(self, *fields: Any) -> StandInPlan:
        self.made.append(fields)
        return StandInPlan(self, fields)


class StandInPlan:
    def __init__(self, module: StandIn, fields: tuple[Any, ...]) -> None:
        self.module, self.num_ops = module, fields[1]
        self.batch, self.width = fields[5:7]
        *tables, bf16, _fragments, _device, _blocks, _limit = fields
        self.plan = _engine.require().make_step_plan(*tables, bf16, 1, "auto")

    def run_row(self, row: int, host: int, device: int, *rest: Any) -> None:
        *task, status, stream = rest
        assert stream == 0
        self.module.when_row(row)
        views = numbers(device, 2, self.num_ops, 4)
        assert host != device
        assert np.array_equal(numbers(host, 2, self.num_ops, 4), views)
        self.module.order.append(row)
        plain = views[:, :, :3].copy()
        plain[views[:, :, 3] != -1, 2] = 0  # this engine finishes a column before it begins the next
        values, starts = plain
        bad = self.plan.run_row(row, values.ctypes.data, starts.ctypes.data, *task)
        if bad >= 0:
            sample_index, column = divmod(bad, self.width)
            word = numbers(status, 1)
            word[0] = min(int(word[0]), (row * self.width + column) * self.batch + sample_index)


class Job:
    """One micro-batch for `sample_cuda`, on the CPU."""

    @torch.inference_mode()
    def __init__(self, prior: Prior, n: int = BATCH, *, precision: str = "float32", **changes: Any) -> None:
        self.given = given_to(prior, n)
        self.request: SampleRequest = request_of(prior, n, self.given, **{"seed": 4, **changes})
        self.extension = StandIn()
        self.compiled = CompiledPlan(compile_plan(prior), CPU)
        self.state = GridState(self.compiled, n, static_inputs(prior, self.request))
        self.precision = precision

    @functools.cached_property
    @torch.inference_mode()
    def step(self) -> CudaStep:
        return CudaStep(self.compiled.plan, self.state.batch, CPU, precision=self.precision, extension=self.extension)

    @torch.inference_mode()
    def run(self, row_done: Callable[[int], None] = lambda rows: None, **options: Any) -> Tensor:
        return sample_cuda(self.compiled, self.step, self.state, self.request, row_done, **options)


def floats(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
