"""The extension's step plan, called from Python with what it must not accept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import needs_extension
from step_tables import (
    BATCH,
    CHANNELS,
    CODES,
    FIRST_COLUMN,
    FIRST_TERM,
    HEADS,
    HEIGHT,
    INCLUSIVE,
    KIND,
    LEVEL,
    NUM_COLUMNS,
    NUM_TAPS,
    NUM_TERM_WEIGHTS,
    NUM_TERMS,
    NUM_WEIGHTS,
    PAIRED,
    SOURCE,
    SOURCE_1,
    SOURCE_2,
    TERM_SOURCE,
    TERM_WEIGHTS,
    WEIGHTS,
    WIDTH,
    Row,
    Tables,
)

pytestmark = needs_extension

# (operation, column of its row, value) and the beginning of the message.
BROKEN_OPS: dict[str, tuple[int, int, int, str]] = {
    "unknown-kind": (3, KIND, 10, "operation 3: unknown kind"),
    "negative-kind": (3, KIND, -1, "operation 3: unknown kind"),
    "no-channels": (3, CHANNELS, 0, "channels: expected 1 to"),
    "negative-channels": (3, CHANNELS, -(2**40), "channels: expected 1 to"),
    "too-many-channels": (3, CHANNELS, 2**40, "channels: expected 1 to"),
    "other-channels": (3, CHANNELS, 7, "operation 3: channels of a source do not fit"),
    "odd-pair": (1, CHANNELS, 15, "operation 1: bad number of channels"),
    "level-beyond": (14, LEVEL, 15, "operation 14: its level is beyond"),
    "level-far-beyond": (14, LEVEL, 2**63 - 1, "operation 14: its level is beyond"),
    "level-of-a-gate-too-low": (2, LEVEL, 0, "operation 2: a source is not known"),
    "level-of-a-sum-too-low": (3, LEVEL, 0, "operation 3: a source is not known"),
    "level-of-a-product-too-low": (6, LEVEL, 1, "operation 6: a source is not known"),
    "level-of-a-query-too-high": (6, LEVEL, 3, "operation 10: a source is not known"),
    "level-of-stored-keys-too-low": (9, LEVEL, 1, "operation 9: a source is not known"),
    "level-of-attention-too-low": (10, LEVEL, 2, "operation 10: a source is not known"),
    "output-of-row-work": (14, LEVEL, -1, "output: expected"),
    "unpaired-gate-input": (1, PAIRED, 0, "operation 2: a source is not known"),
    "paired-gate": (2, PAIRED, 1, "operation 2: what a gate gives"),
    "paired-sum": (3, PAIRED, 1, "operation 3: a source is not known"),
    "unpaired-halves": (5, PAIRED, 0, "operation 5: concatenated halves"),
    "source-missing": (4, SOURCE, -1, "operation 4: a source does not exist"),
    "source-beyond": (4, SOURCE, 15, "operation 4: a source does not exist"),
    "source-far-beyond": (4, SOURCE, 2**63 - 1, "operation 4: a source does not exist"),
    "source-is-itself": (4, SOURCE, 4, "operation 4: a source is not known"),
    "source-is-later": (3, SOURCE_1, 4, "operation 3: a source is not known"),
    "second-source-beyond": (3, SOURCE_1, 99, "operation 3: a source does not exist"),
    "keys-not-stored": (10, SOURCE_1, 7, "operation 10: attention needs"),
    "values-of-another-width": (10, SOURCE_2, 5, "operation 10: attention needs"),
    "no-heads": (10, HEADS, 0, "operation 10: attention needs"),
    "heads-that-do-not-divide": (10, HEADS, 3, "operation 10: attention needs"),
    "negative-term": (6, FIRST_TERM, -1, "operation 6: terms do not exist"),
    "term-beyond": (6, FIRST_TERM, 7, "operation 6: terms do not exist"),
    "term-that-overflows": (6, FIRST_TERM, 2**63 - 1, "operation 6: terms do not exist"),
    "no-terms": (6, NUM_TERMS, 0, "operation 6: terms do not exist"),
    "too-many-terms": (6, NUM_TERMS, 17, "operation 6: terms do not exist"),
    "no-taps": (0, NUM_TAPS, 0, "operation 0: a lookup needs taps"),
    "more-taps-than-the-table-has": (0, NUM_TAPS, 2, "operation 0: a lookup needs taps"),
    "taps-that-overflow": (0, NUM_TAPS, 2**62, "operation 0: a lookup needs taps"),
    "no-table": (0, WEIGHTS, 0, "weights: expected the address of an aligned array"),
    "misaligned-table": (0, WEIGHTS, 4099, "weights: expected the address of an aligned array"),
    "table-of-another-size": (0, NUM_WEIGHTS, 39, "operation 0: a lookup needs taps"),
    "empty-table": (0, NUM_WEIGHTS, 0, "operation 0: a lookup needs taps"),
}
BROKEN_TERMS: dict[str, tuple[int, int, int, str]] = {
    "source-missing": (1, TERM_SOURCE, -1, "operation 6: a source does not exist"),
    "source-beyond": (1, TERM_SOURCE, 15, "operation 6: a source does not exist"),
    "source-is-itself": (1, TERM_SOURCE, 6, "operation 6: a source is not known"),
    "source-of-its-level": (1, TERM_SOURCE, 7, "operation 6: a source is not known"),
    "reads-the-future": (1, FIRST_COLUMN, 1, "operation 6: a term reads columns"),
    "reads-into-the-future": (3, NUM_COLUMNS, 4, "operation 7: a term reads columns"),
    "no-columns": (1, NUM_COLUMNS, 0, "operation 6: a term reads columns"),
    "columns-that-overflow": (3, FIRST_COLUMN, -(2**63), "operation 7: a term reads columns"),
    "too-many-columns": (3, NUM_COLUMNS, 2**62, "operation 7: a term reads columns"),
    "more-columns-than-weights": (3, NUM_COLUMNS, 1, "operation 7: a term needs weights"),
    "no-weights": (1, TERM_WEIGHTS, 0, "weights: expected the address of an aligned array"),
    "misaligned-weights": (1, TERM_WEIGHTS, 4097, "weights: expected the address of an aligned array"),
    "weights-of-another-size": (1, NUM_TERM_WEIGHTS, 63, "operation 6: a term needs weights"),
    "source-of-another-width": (1, TERM_SOURCE, 1, "operation 6: a term needs weights"),
}
BROKEN_SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "no-operations": ({"num_ops": 0}, "num_ops: expected"),
    "too-many-operations": ({"num_ops": 2**40}, "num_ops: expected"),
    "negative-terms": ({"num_terms": -1}, "num_terms: expected"),
    "null-operations": ({"ops": 0}, "ops: expected the address of an aligned array, got 0"),
    "misaligned-operations": ({"ops": 4100}, "ops: expected the address of an aligned array, got 4100"),
    "null-terms": ({"terms": 0}, "terms: expected the address of an aligned array, got 0"),
    "output-missing": ({"output": -1}, "output: expected"),
    "output-beyond": ({"output": 15}, "output: expected"),
    "output-of-another-width": ({"output": 13}, "output: expected"),
    "no-samples": ({"batch": 0}, "shape: expected"),
    "no-width": ({"width": 0}, "shape: expected"),
    "no-codes": ({"num_codes": 0}, "shape: expected"),
    "codes-unlike-the-table": ({"num_codes": 6}, "operation 0: a lookup needs taps"),
    "fewer-positions-than-columns": ({"positions": 3}, "shape: expected"),
    "short-keys": ({"key_stride": 0}, "shape: expected"),
    "unpadded-keys": ({"key_stride": 12}, "shape: expected"),
    "endless-keys": ({"key_stride": 2**62}, "shape: expected"),
    "no-threads": ({"threads": 0}, "shape: expected"),
    "negative-threads": ({"threads": -1}, "shape: expected"),
    "too-many-threads": ({"threads": 2**40}, "shape: expected"),
    "unknown-kernels": ({"kernels": "mmx"}, "kernels: expected auto, or avx512, avx2 or baseline"),
}
BROKEN_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "row-before": ({"row": -1}, "row: expected a row of the grid"),
    "row-behind": ({"row": HEIGHT}, "row: expected a row of the grid"),
    "row-that-overflows": ({"row": 2**62}, "row: expected a row of the grid"),
    "last-row": ({"row": 2**63 - 1}, "row: expected a row of the grid"),
    **{
        f"{fault}-{name}": ({name: address}, f"{name}: expected the address of an aligned array, got {address}")
        for name in ("values", "starts", "codes", "uniforms")
        for fault, address in (("null", 0), ("misaligned", 4099))
    },
    "null-known": ({"known": 0}, "known: expected the address"),
    "temperature-zero": ({"temperature": 0.0}, "temperature: expected a positive normal float32"),
    "temperature-negative": ({"temperature": -1.0}, "temperature: "),
    "temperature-nan": ({"temperature": float("nan")}, "temperature: "),
    "temperature-infinite": ({"temperature": float("inf")}, "temperature: "),
    "temperature-subnormal": ({"temperature": 1e-40}, "temperature: "),
    "top-k-zero": ({"top_k": 0}, "top_k: expected 1 to num_codes"),
    "top-k-beyond": ({"top_k": CODES + 1}, "top_k: "),
    "top-p-zero": ({"top_p": 0.0}, r"top_p: expected a value in \(0, 1\]"),
    "top-p-beyond": ({"top_p": 1.5}, "top_p: "),
    "top-p-nan": ({"top_p": float("nan")}, "top_p: "),
}


def test_the_tables_are_accepted_as_they_are() -> None:
    tables = Tables()
    for threads in (1, 3):
        row = Row(tables)
        plan = tables.make(threads=threads)
        assert [row.run(plan, row=number) for number in range(HEIGHT)] == [-1] * HEIGHT
        assert plan.weight_bytes > 0
        assert plan.kernels in ("avx512", "avx2", "baseline")
    tables.ops[10, INCLUSIVE] = 1
    assert Row(tables).run(tables.make()) == -1


@pytest.mark.parametrize(("op", "column", "value", "message"), BROKEN_OPS.values(), ids=BROKEN_OPS)
def test_refuses_operations(op: int, column: int, value: int, message: str) -> None:
    tables = Tables()
    tables.ops[op, column] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        tables.make()


@pytest.mark.parametrize(("term", "column", "value", "message"), BROKEN_TERMS.values(), ids=BROKEN_TERMS)
def test_refuses_terms(term: int, column: int, value: int, message: str) -> None:
    tables = Tables()
    tables.terms[term, column] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        tables.make()


def test_inclusive_attention_needs_keys_and_values_of_its_own_position() -> None:
    tables = Tables()
    tables.ops[8, LEVEL] = 3  # soon enough for strict attention, which reads earlier positions
    assert Row(tables).run(tables.make()) == -1
    tables.ops[10, INCLUSIVE] = 1
    with pytest.raises(ValueError, match="^operation 10: a source is not known at its level"):
        tables.make()


@pytest.mark.parametrize(("changes", "message"), BROKEN_SHAPES.values(), ids=BROKEN_SHAPES)
def test_refuses_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Tables().make(**changes)


@pytest.mark.parametrize(("changes", "message"), BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_refuses_rows(changes: dict[str, Any], message: str) -> None:
    tables = Tables()
    row = Row(tables)
    with pytest.raises(ValueError, match=f"^{message}"):
        row.run(tables.make(), **changes)
    assert not row.codes.any()


BROKEN_VIEWS: dict[str, tuple[Callable[[Row], object], str]] = {
    "no-values": (lambda row: row.values.__setitem__((6, 0), 0), "operation 6: no memory for its values"),
    "misaligned-values": (lambda row: row.values.__setitem__((6, 0), 4099), "values: expected the address"),
    "no-start": (lambda row: row.starts.__setitem__((6, 0), 0), "operation 6: no start from the rows above"),
    "columns-apart": (lambda row: row.values.__setitem__((3, 2), 16), "operation 7: columns lie apart"),
    "past-not-kept": (lambda row: row.values.__setitem__((3, 2), 0), "operation 7: columns"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN_VIEWS.values(), ids=BROKEN_VIEWS)
def test_refuses_views(change: Callable[[Row], object], message: str) -> None:
    tables = Tables()
    row = Row(tables)
    change(row)
    with pytest.raises(ValueError, match=f"^{message}"):
        row.run(tables.make())


@pytest.mark.parametrize("code", [-1, CODES, 2**40])
def test_refuses_known_codes_out_of_range(code: int) -> None:
    tables = Tables()
    row = Row(tables)
    row.codes[1, 2] = code
    assert row.run(tables.make()) == -1  # not known: never read, and drawn
    assert 0 <= row.codes[1, 2] < CODES
    row.codes[1, 2] = code
    row.known[1, 2] = True
    with pytest.raises(ValueError, match="^codes: expected known codes of 0 to num_codes - 1"):
        row.run(tables.make())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), float("inf")])
def test_reports_where_nothing_can_be_drawn(value: float, threads: int) -> None:
    tables = Tables()
    plan = tables.make(threads=threads)
    row = Row(tables)
    row.uniforms[1, 2] = value
    assert row.run(plan) == 1 * WIDTH + 2
    row = Row(tables)
    logits = np.full((BATCH, WIDTH, CODES), 0.5, dtype=np.float32)
    logits[1, 1, 3] = np.nan
    row.starts[14] = (logits.ctypes.data, logits[0].size, CODES)
    assert row.run(plan) == 1 * WIDTH + 1


@pytest.mark.parametrize(
    "changes", [{"row": "0"}, {"row": 1.5}, {"values": None}, {"temperature": "hot"}, {"top_k": 2**70}, {"codes": -8}]
)
def test_refuses_other_types(changes: dict[str, Any]) -> None:
    tables = Tables()
    with pytest.raises(TypeError):
        Row(tables).run(tables.make(), **changes)


def test_broken_tables_are_refused_or_run() -> None:
    """In a process of its own, see there."""
    program = Path(__file__).parents[1] / "step_tables.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, run = map(int, done.stdout.split())
    assert refused > 500
    assert run > 100
