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
from fastvq.sampling.engines.step_tables import OP, STATIC, TERM, kind_numbers

CODES, WIDTH, HEIGHT, BATCH = 5, 4, 3, 2
ROOM = 64  # floats that there are wherever the tables cannot say how many

# (source, channels of the source), and then first column, columns, first row and rows.
Window = tuple[int, int, int, int, int, int]


def place(source: int, channels: int) -> Window:
    return source, channels, 0, 1, 0, 1


class Tables:
    """Operations, terms and the rest of what `make_grid_plan` takes; change what you like before calling `make`.

    Operations 0 to 14 belong to the step phase; 15 and 16 are static, 17 is the same everywhere, 18 is known above.

    Args:
        attention: else its place is taken by an activation, and grids can be filled in tiles.
    """

    def __init__(self, *, attention: bool = True) -> None:
        self.memory: list[np.ndarray] = []
        self.terms = np.zeros(0, dtype=TERM)
        self.ops = np.zeros(19, dtype=OP)
        self.ops["sources"], self.ops["above_level"] = -1, -1
        self.op(0, "lookup", 8, 0, num_taps=1)
        self.ops[0]["weights"], self.ops[0]["num_weights"] = self.weights(CODES * 8)
        self.above(0, 0, [(-1, CODES, 1, 1, -1, 1)])
        self.affine(1, 16, 1, [place(0, 8)], paired=1)
        self.op(2, "glu", 8, 1, (1,))
        self.op(3, "add", 8, 1, (0, 2))
        self.op(4, "elu", 8, 1, (3,))
        self.op(5, "concat_elu", 16, 1, (3,), paired=1)
        self.affine(6, 8, 2, [place(4, 8)])
        self.above(6, 1, [place(18, 8)])
        self.affine(7, 8, 2, [place(4, 8), (3, 8, -2, 2, 0, 1)])
        self.above(7, 0, [(4, 8, -1, 3, -2, 2)])
        self.affine(8, 8, 2, [place(5, 16)])
        self.op(9, "store_keys", 8, 2, (7,))
        if attention:
            self.op(10, "attention", 8, 3, (6, 9, 8), heads=2)
        else:
            self.op(10, "relu", 8, 3, (8,))
        self.affine(11, 16, 4, [place(10, 8)], paired=1)
        self.op(12, "tanh", 8, 4, (11,))
        self.op(13, "relu", 8, 4, (12,))
        self.affine(14, CODES, 5, [place(13, 8)])
        self.op(15, "static", 6, -1, uniform=1)
        self.op(16, "static", 3, -1)
        self.affine(17, 8, -1, [], uniform=1)
        self.once(17, [place(15, 6)])
        self.affine(18, 8, -1, [])
        self.above(18, 0, [place(16, 3)])
        self.once(18, [place(17, 8)])
        for index, op in enumerate(self.ops):
            if op["kind"] in (kind_numbers()["lookup"], kind_numbers()["affine"]):
                self.ops[index]["bias"] = self.weights(ROOM)[0]
        self.shape: dict[str, Any] = {
            "output": 14,
            "height": HEIGHT,
            "width": WIDTH,
            "num_codes": CODES,
            "bf16": False,
            "kernels": "auto",
        }

    def op(
        self, index: int, kind: str, channels: int, level: int, sources: tuple[int, ...] = (), **fields: int
    ) -> None:
        row = self.ops[index]
        row["kind"], row["channels"], row["level"] = kind_numbers()[kind], channels, level
        row["sources"] = (*sources, -1, -1, -1)[:3]
        for name, value in fields.items():
            row[name] = value

    def affine(self, index: int, channels: int, level: int, windows: list[Window], **fields: int) -> None:
        self.op(index, "affine", channels, level, **fields)
        self.ops[index]["first_term"], self.ops[index]["num_terms"] = self.add(index, windows)

    def above(self, index: int, level: int, windows: list[Window]) -> None:
        self.ops[index]["above_level"] = level
        self.ops[index]["first_above"], self.ops[index]["num_above"] = self.add(index, windows)

    def once(self, index: int, windows: list[Window]) -> None:
        self.ops[index]["first_once"], self.ops[index]["num_once"] = self.add(index, windows)

    def add(self, index: int, windows: list[Window]) -> tuple[int, int]:
        first, channels = len(self.terms), int(self.ops[index]["channels"])
        new = [
            (source, column, columns, *self.weights(rows * columns * depth * channels), row, rows)
            for source, depth, column, columns, row, rows in windows
        ]
        self.terms = np.concatenate([self.terms, np.array(new, dtype=TERM)])
        return first, len(windows)

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
        return _engine.require().make_grid_plan(**{**fields, **self.shape, **changes})


class Grid:
    """Memory for the grids of these tables, and the arguments of `GridPlan.run`."""

    def __init__(self, tables: Tables, batch: int = BATCH) -> None:
        height, width = int(tables.shape["height"]), int(tables.shape["width"])
        self.batch, self.width = batch, width
        self.room = np.zeros(ROOM, dtype=np.float32)
        self.context = np.zeros(batch * height * width * 3 + ROOM, dtype=np.float32)
        # Whichever operations are static.
        self.statics = np.zeros(len(tables.ops), dtype=STATIC)
        self.statics["data"] = self.room.ctypes.data
        self.statics[16] = (self.context.ctypes.data, height * width * 3, width * 3, 3)
        self.codes = np.zeros((batch, height, width), dtype=np.int64)
        self.uniforms = np.full((batch, height, width), 0.5, dtype=np.float32)
        self.known = np.zeros((batch, height, width), dtype=bool)
        self.logits = np.full((batch, height, width, int(tables.shape["num_codes"])), np.nan, dtype=np.float32)
        self.rows: list[int] = []

    def run(self, plan: Any, **changes: Any) -> tuple[int, int, int] | None:
        """Where a code could not be drawn, if anywhere."""
        fields: dict[str, Any] = {
            "batch": self.batch,
            "tile": self.width,
            "offset": 1,
            "threads": 1,
            "step_threads": 1,
            "statics": self.statics.ctypes.data,
            "codes": self.codes.ctypes.data,
            "uniforms": self.uniforms.ctypes.data,
            "known": self.known.ctypes.data,
            "logits": self.logits.ctypes.data,
            "temperature": 1.0,
            "top_k": CODES,
            "top_p": 1.0,
            "rows_complete": self.rows.append,
        }
        bad, above, steps = plan.run(**{**fields, **changes})
        assert above >= 0.0
        assert steps >= 0.0
        return bad


EXTREMES = (-(2**63), -(2**62), -(2**31), -1, 0, 1, 2, 2**24, 2**31, 2**40, 2**62, 2**63 - 1)
NUMBERS = st.one_of(st.integers(-3, 20), st.sampled_from(EXTREMES))
SIZES = ("output", "height", "width", "num_codes")


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def hand_over_broken_tables(data: st.DataObject) -> None:
    """Whatever is in the tables, they are refused or can be run. What lies at an address is the caller's word."""
    tables = copy.deepcopy(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(("ops", "ops", "terms", "shape")))
        if where == "shape":
            tables.shape[data.draw(st.sampled_from(SIZES))] = data.draw(NUMBERS)
            continue
        table = getattr(tables, where)
        row = table[data.draw(st.integers(0, len(table) - 1))]
        name = data.draw(st.sampled_from(table.dtype.names))
        value = data.draw(NUMBERS)
        if name == "sources":
            row[name][data.draw(st.integers(0, 2))] = value
        elif name in ("weights", "bias"):
            row[name] = 0
        else:
            # The extension has to believe how much memory there is, so it is never told of more than there is.
            row[name] = min(value, int(row[name])) if name == "num_weights" else value
    front = {"tile": data.draw(st.integers(1, 5)), "offset": data.draw(st.integers(1, 5))}
    try:
        plan = tables.make()
        if data.draw(st.booleans()):
            front = {"tile": int(tables.shape["width"]), "offset": 1}
        small = int(tables.shape["height"]) * int(tables.shape["width"]) <= 400
        if plan.memory_bytes(BATCH, **front) < 2**26 and small:
            threads = data.draw(st.sampled_from((1, 2, 3)))
            Grid(tables).run(plan, **front, threads=threads, step_threads=min(threads, 2))
            COUNTS["run"] += 1
    except (ValueError, MemoryError):
        COUNTS["refused"] += 1


COUNTS = {"refused": 0, "run": 0}

if __name__ == "__main__":
    BASES = (Tables(), Tables(attention=False))
    for base in BASES:
        assert Grid(base).run(base.make()) is None
    hand_over_broken_tables()
    print(COUNTS["refused"], COUNTS["run"])
