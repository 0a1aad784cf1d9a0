"""A small plan as the extension reads it. Run as a program, it hands the extension thousands of broken ones.

That is a program of its own because a defect there would end the process.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvq import _engine

LOOKUP, AFFINE, ELU, CONCAT_ELU, RELU, ADD, GLU, TANH, STORE_KEYS, ATTEND = range(10)
KIND, CHANNELS, LEVEL, PAIRED, SOURCE, SOURCE_1, SOURCE_2, HEADS, INCLUSIVE = range(9)
FIRST_TERM, NUM_TERMS, NUM_TAPS, WEIGHTS, NUM_WEIGHTS = range(9, 14)
TERM_SOURCE, FIRST_COLUMN, NUM_COLUMNS, TERM_WEIGHTS, NUM_TERM_WEIGHTS = range(5)

CODES, WIDTH, HEIGHT, BATCH = 5, 4, 3, 2
PADDING = 64  # columns before the first one that a term may reach


class Tables:
    """Operations, terms and the rest of what `make_step_plan` takes; change what you like before calling `make`."""

    def __init__(self) -> None:
        self.memory: list[np.ndarray] = []
        self.terms = np.zeros((0, 5), dtype=np.int64)
        rows = [
            self.op(LOOKUP, 8, 0, taps=1),
            self.affine(16, 1, [(0, 0, 1, 8)], paired=1),
            self.op(GLU, 8, 1, sources=(1,)),
            self.op(ADD, 8, 1, sources=(0, 2)),
            self.op(ELU, 8, 1, sources=(3,)),
            self.op(CONCAT_ELU, 16, 1, sources=(3,), paired=1),
            self.affine(8, 2, [(4, 0, 1, 8)]),
            self.affine(8, 2, [(4, 0, 1, 8), (3, -2, 2, 8)]),
            self.affine(8, 2, [(5, 0, 1, 16)]),
            self.op(STORE_KEYS, 8, 2, sources=(7,)),
            self.op(ATTEND, 8, 3, sources=(6, 9, 8), heads=2),
            self.affine(16, 4, [(10, 0, 1, 8)], paired=1),
            self.op(TANH, 8, 4, sources=(11,)),
            self.op(RELU, 8, 4, sources=(12,)),
            self.affine(CODES, 5, [(13, 0, 1, 8)]),
        ]
        self.ops = np.array(rows, dtype=np.int64)
        self.shape: dict[str, Any] = {
            "output": 14,
            "batch": BATCH,
            "width": WIDTH,
            "positions": HEIGHT * WIDTH,
            "num_codes": CODES,
            "key_stride": 16,
            "bf16": False,
            "threads": 1,
            "kernels": "auto",
        }

    def op(
        self,
        kind: int,
        channels: int,
        level: int,
        *,
        sources: tuple[int, ...] = (),
        paired: int = 0,
        heads: int = 0,
        taps: int = 0,
    ) -> list[int]:
        table = self.weights(taps * CODES * channels) if taps else (0, 0)
        return [kind, channels, level, paired, *(*sources, -1, -1, -1)[:3], heads, 0, 0, 0, taps, *table]

    def affine(
        self, channels: int, level: int, terms: list[tuple[int, int, int, int]], *, paired: int = 0
    ) -> list[int]:
        """Terms are (source, first column, columns, channels of the source)."""
        row = self.op(AFFINE, channels, level, paired=paired)
        row[FIRST_TERM], row[NUM_TERMS] = len(self.terms), len(terms)
        new = [
            [source, first, columns, *self.weights(columns * depth * channels)]
            for source, first, columns, depth in terms
        ]
        self.terms = np.concatenate([self.terms, np.array(new, dtype=np.int64)])
        return row

    def weights(self, count: int) -> tuple[int, int]:
        values = np.random.default_rng(len(self.memory)).normal(size=count).astype(np.float32)
        self.memory.append(values)
        return values.ctypes.data, count

    def make(self, **changes: Any) -> Any:
        fields = {
            "ops": self.ops.ctypes.data,
            "num_ops": len(self.ops),
            "terms": self.terms.ctypes.data,
            "num_terms": len(self.terms),
        }
        return _engine.require().make_step_plan(**{**fields, **self.shape, **changes})


class Row:
    """Memory for a row of these tables, and the arguments of `run_row`."""

    def __init__(self, tables: Tables) -> None:
        batch, width, positions = (int(tables.shape[name]) for name in ("batch", "width", "positions"))
        self.memory: list[np.ndarray] = []
        self.values = np.zeros((len(tables.ops), 3), dtype=np.int64)
        self.starts = np.zeros((len(tables.ops), 3), dtype=np.int64)
        for index, op in enumerate(tables.ops):
            channels = int(op[CHANNELS])
            if op[KIND] == STORE_KEYS:
                keys = self.zeros(batch, channels * int(tables.shape["key_stride"]))
                self.values[index] = (keys.ctypes.data, keys.shape[1], 0)
                continue
            value = self.zeros(batch, PADDING + positions, channels)
            self.values[index] = (value[0, PADDING].ctypes.data, value[0].size, channels)
            start = self.zeros(batch, width, channels)
            self.starts[index] = (start.ctypes.data, start[0].size, channels)
        self.codes = np.zeros((batch, width), dtype=np.int64)
        self.uniforms = np.full((batch, width), 0.5, dtype=np.float32)
        self.known = np.zeros((batch, width), dtype=bool)

    def zeros(self, *shape: int) -> np.ndarray:
        self.memory.append(np.zeros(shape, dtype=np.float32))
        return self.memory[-1]

    def run(self, plan: Any, **changes: Any) -> int:
        width = self.codes.shape[1]
        fields: dict[str, Any] = {
            "row": 0,
            "values": self.values.ctypes.data,
            "starts": self.starts.ctypes.data,
            "codes": self.codes.ctypes.data,
            "code_stride": width,
            "uniforms": self.uniforms.ctypes.data,
            "uniform_stride": width,
            "known": self.known.ctypes.data,
            "known_stride": width,
            "temperature": 1.0,
            "top_k": CODES,
            "top_p": 1.0,
        }
        return int(plan.run_row(**{**fields, **changes}))


EXTREMES = (-(2**63), -(2**62), -(2**31), -1, 0, 1, 2, 2**24, 2**31, 2**40, 2**62, 2**63 - 1)
NUMBERS = st.one_of(st.integers(-3, 20), st.sampled_from(EXTREMES))
SIZES = ("output", "batch", "width", "positions", "num_codes", "key_stride", "threads", "num_ops", "num_terms")


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def hand_over_broken_tables(data: st.DataObject) -> None:
    """Whatever is in the tables, they are refused or can be run. What lies at an address is the caller's word."""
    tables = copy.deepcopy(BASE)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(("ops", "ops", "terms", "shape")))
        if where == "shape":
            name = data.draw(st.sampled_from(SIZES[:-2]))
            tables.shape[name] = data.draw(NUMBERS)
        else:
            table = getattr(tables, where)
            row = data.draw(st.integers(0, len(table) - 1))
            column = data.draw(st.integers(0, table.shape[1] - 1))
            address = column == (WEIGHTS if where == "ops" else TERM_WEIGHTS)
            count = column == (NUM_WEIGHTS if where == "ops" else NUM_TERM_WEIGHTS)
            value = data.draw(NUMBERS)
            # The extension has to believe how much memory there is, so it is never told of more than there is.
            table[row, column] = min(value, int(table[row, column])) if count else 0 if address else value
    try:
        plan = tables.make()
        small = max(int(tables.shape[name]) for name in ("batch", "width", "positions", "threads")) <= 64
        if small and all(tables.terms[:, FIRST_COLUMN] >= -PADDING):
            Row(tables).run(plan)
            COUNTS["run"] += 1
    except (ValueError, MemoryError):
        COUNTS["refused"] += 1


BASE = Tables()
COUNTS = {"refused": 0, "run": 0}

if __name__ == "__main__":
    assert Row(BASE).run(BASE.make()) == -1
    hand_over_broken_tables()
    print(COUNTS["refused"], COUNTS["run"])
