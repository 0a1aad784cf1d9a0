"""The interface of the extension's CUDA engine with an interpreter behind it, for what Python does around it."""

from __future__ import annotations

import ctypes
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from engine_helpers import (
    given_to,
    request_of,
)
from torch import Tensor

from fastvq.models import Prior
from fastvq.ops.draw import draw
from fastvq.sampling.engines import RowDone, static_inputs
from fastvq.sampling.engines.cuda_grid import CudaStep, sample_cuda
from fastvq.sampling.engines.state import CompiledPlan, GridState, elementwise
from fastvq.sampling.engines.step_tables import OP, TERM, kind_numbers
from fastvq.sampling.plan import Op, compile_plan
from fastvq.sampling.request import SampleRequest

CPU = torch.device("cpu")
BATCH = 3


def array(address: int, dtype: Any, *shape: int, strides: tuple[int, ...] | None = None) -> np.ndarray:
    """What lies at an address; strides in bytes."""
    dtype = np.dtype(dtype)
    steps = strides or tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    size = dtype.itemsize + sum(step * (count - 1) for step, count in zip(steps, shape, strict=True))
    return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(address), strides=steps)


def numbers(address: int, *shape: int) -> np.ndarray:
    """The int64 array at an address."""
    return array(address, np.int64, *shape)


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
    """The step phase of a plan, read off the tables that the extension is given."""

    def __init__(self, module: StandIn, fields: tuple[Any, ...]) -> None:
        self.module = module
        ops, self.num_ops, terms, num_terms, self.output, self.batch, self.width = fields[:7]
        self.positions, self.num_codes, self.key_stride, bf16 = fields[7:11]
        if self.batch < 1:
            raise ValueError("shape: expected positive sizes")
        self.ops = array(ops, OP, self.num_ops).copy()
        self.terms = array(terms, TERM, num_terms).copy() if num_terms else np.zeros(0, TERM)
        names = {number: name for name, number in kind_numbers().items()}
        self.kinds = [names[int(kind)] for kind in self.ops["kind"]]
        self.weights = [torch.from_numpy(self._weights(term)) for term in self.terms]
        if bf16:
            self.weights = [weight.bfloat16().float() for weight in self.weights]
        self.tables = {i: torch.from_numpy(self._weights(op)) for i, op in enumerate(self.ops) if op["num_weights"]}

    @staticmethod
    def _weights(entry: Any) -> np.ndarray:
        return array(int(entry["weights"]), np.float32, int(entry["num_weights"])).copy()

    def run_row(self, row: int, host: int, device: int, *rest: Any) -> None:
        codes, code_stride, uniforms, uniform_stride, known, known_stride, *settings, status, stream = rest
        assert stream == 0
        self.module.when_row(row)
        self.values, self.starts = numbers(device, 2, self.num_ops, 4)
        assert host != device
        assert np.array_equal(numbers(host, 2, self.num_ops, 4), numbers(device, 2, self.num_ops, 4))
        self.module.order.append(row)
        sizes = (self.batch, self.width)
        self.codes = torch.from_numpy(array(codes, np.int64, *sizes, strides=(8 * code_stride, 8)))
        noise = torch.from_numpy(array(uniforms, np.float32, *sizes, strides=(4 * uniform_stride, 4)))
        keep = torch.from_numpy(array(known, np.bool_, *sizes, strides=(known_stride, 1)))
        temperature, top_k, top_p = settings
        for column in range(self.width):
            for index in np.lexsort((np.arange(self.num_ops), self.ops["level"])):
                if self.ops[index]["level"] >= 0:
                    self._run(int(index), row, column)
            logits = self._at(self.values, self.output, column)
            bad = (logits.isnan() | (logits == torch.inf)).any(1) | (logits == -torch.inf).all(1)
            if bad.any():
                word = numbers(status, 1)
                first = int(bad.nonzero()[0])
                word[0] = min(int(word[0]), (row * self.width + column) * self.batch + first)
                return
            chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            drawn = draw(logits.clone(), noise[:, column].clone(), **chosen, backend="torch")
            self.codes[:, column] = torch.where(keep[:, column], self.codes[:, column], drawn)

    def _at(self, views: np.ndarray, index: int, column: int, columns: int = 1) -> Tensor:
        """The vectors of some columns one after the other: [B, columns * C], shared with the engine."""
        data, batch_stride, stride, mask = (int(number) for number in views[index])
        channels = int(self.ops[index]["channels"])
        at = data + 4 * (column & mask) * stride
        found = array(at, np.float32, self.batch, columns * channels, strides=(4 * batch_stride, 4))
        return torch.from_numpy(found)

    def _run(self, index: int, row: int, column: int) -> None:
        op, kind = self.ops[index], self.kinds[index]
        sources = [int(source) for source in op["sources"]]
        position = row * self.width + column
        if kind == "store_keys":
            data, batch_stride = (int(number) for number in self.values[index][:2])
            strides = (4 * batch_stride, 4 * self.key_stride)
            keys = array(data + 4 * position, np.float32, self.batch, int(op["channels"]), strides=strides)
            keys[:] = self._at(self.values, sources[0], column).numpy()
            return
        self._at(self.values, index, column)[:] = self._value(op, kind, index, sources, position)

    def _value(self, op: Any, kind: str, index: int, sources: list[int], position: int) -> Tensor:
        column, channels = position % self.width, int(op["channels"])
        if kind in ("lookup", "affine"):
            total = self._at(self.starts, index, column).clone()
            for tap in range(int(op["num_taps"]) if kind == "lookup" else 0):
                if (read := column + tap - int(op["num_taps"])) >= 0:
                    table = self.tables[index].view(-1, self.num_codes, channels)[tap]
                    total += table[self.codes[:, read]]
            for t in range(int(op["first_term"]), int(op["first_term"] + op["num_terms"])):
                term, weight = self.terms[t], self.weights[t].view(-1, channels)
                first, columns = column + int(term["first_column"]), int(term["num_columns"])
                total += self._at(self.values, int(term["source"]), first, columns) @ weight
            return total
        if kind == "attention":
            return self._attend(op, sources, position)
        x = self._at(self.values, sources[0], column)
        if kind == "add":
            return x + self._at(self.values, sources[1], column)
        of = {"elu": ("activation", "elu"), "concat_elu": ("activation", "concat_elu"), "relu": ("activation", "relu")}
        of |= {"glu": ("gate", "glu"), "tanh": ("gate", "tanh")}
        return elementwise(Op(index, *of[kind][:1], channels, variant=of[kind][1]), [x])  # type: ignore[arg-type]

    def _attend(self, op: Any, sources: list[int], position: int) -> Tensor:
        query, key, value = sources
        row, column = divmod(position, self.width)
        count, heads = position + int(op["inclusive"]), int(op["heads"])
        if count == 0:
            return torch.zeros(self.batch, int(op["channels"]))
        widths = [int(self.ops[source]["channels"]) for source in sources]
        keys, values = (self.values[source] for source in (key, value))
        strides = (4 * int(keys[1]), 4 * self.key_stride, 4)
        k = torch.from_numpy(array(int(keys[0]), np.float32, self.batch, widths[1], count, strides=strides))
        begin = int(values[0]) - 4 * row * self.width * int(values[2])  # the view begins with the row
        strides = (4 * int(values[1]), 4 * int(values[2]), 4)
        v = torch.from_numpy(array(begin, np.float32, self.batch, count, widths[2], strides=strides))
        q = self._at(self.values, query, column).unflatten(1, (heads, 1, -1))
        k, v = k.unflatten(1, (heads, -1)).transpose(2, 3), v.unflatten(2, (heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


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
    def run(self, row_done: RowDone = lambda rows, codes: None, **options: Any) -> Tensor:
        return sample_cuda(self.step, self.state, self.request, row_done, **options)


def floats(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
