"""The extension's engine for whole grids, called from Python with what it must not accept."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import needs_extension
from grid_tables import BATCH, CODES, HEIGHT, WIDTH, Grid, Tables

from fastvq import _engine
from fastvq.sampling.engines import step_tables

pytestmark = needs_extension

# (operation, field, value) and the beginning of the message; a number after "sources" says which.
BROKEN_OPS: dict[str, tuple[int, str, int, str]] = {
    "unknown-kind": (3, "kind", 11, "operation 3: unknown kind"),
    "negative-kind": (3, "kind", -1, "operation 3: unknown kind"),
    "unknown-kind-before": (18, "kind", 11, "operation 18: unknown kind"),
    "no-channels": (3, "channels", 0, "channels: expected 1 to"),
    "negative-channels": (3, "channels", -(2**40), "channels: expected 1 to"),
    "too-many-channels": (3, "channels", 2**40, "channels: expected 1 to"),
    "other-channels": (3, "channels", 7, "operation 3: channels of a source do not fit"),
    "odd-pair": (1, "channels", 15, "operation 1: bad number of channels"),
    "level-beyond": (14, "level", 19, "operation 14: its level is beyond"),
    "level-far-beyond": (14, "level", 2**63 - 1, "operation 14: its level is beyond"),
    "level-of-a-gate-too-low": (2, "level", 0, "operation 2: a source is not known"),
    "level-of-a-sum-too-low": (3, "level", 0, "operation 3: a source is not known"),
    "level-of-a-product-too-low": (6, "level", 1, "operation 6: a source is not known"),
    "level-of-a-query-too-high": (6, "level", 3, "operation 10: a source is not known"),
    "level-of-stored-keys-too-low": (9, "level", 1, "operation 9: a source is not known"),
    "level-of-attention-too-low": (10, "level", 2, "operation 10: a source is not known"),
    "output-known-before": (14, "level", -1, "output: expected"),
    "unpaired-gate-input": (1, "paired", 0, "operation 2: a source is not known"),
    "paired-gate": (2, "paired", 1, "operation 2: what a gate gives"),
    "paired-sum": (3, "paired", 1, "operation 3: a source is not known"),
    "unpaired-halves": (5, "paired", 0, "operation 5: concatenated halves"),
    "source-missing": (4, "sources0", -1, "operation 4: a source does not exist"),
    "source-beyond": (4, "sources0", 19, "operation 4: a source does not exist"),
    "source-far-beyond": (4, "sources0", 2**63 - 1, "operation 4: a source does not exist"),
    "source-is-itself": (4, "sources0", 4, "operation 4: a source is not known"),
    "source-is-later": (3, "sources1", 4, "operation 3: a source is not known"),
    "second-source-beyond": (3, "sources1", 99, "operation 3: a source does not exist"),
    "source-is-a-cache": (13, "sources0", 9, "operation 13: only attention reads keys"),
    "keys-not-stored": (10, "sources1", 7, "operation 10: attention needs"),
    "values-of-another-width": (10, "sources2", 5, "operation 10: attention needs"),
    "values-that-windows-read": (10, "sources2", 4, "operation 4: attention and windows read its past"),
    "no-heads": (10, "heads", 0, "operation 10: attention needs"),
    "heads-that-do-not-divide": (10, "heads", 3, "operation 10: attention needs"),
    "negative-term": (6, "first_term", -1, "operation 6: terms do not exist"),
    "term-beyond": (6, "first_term", 13, "operation 6: terms do not exist"),
    "term-that-overflows": (6, "first_term", 2**63 - 1, "operation 6: terms do not exist"),
    "no-terms": (6, "num_terms", 0, "operation 6: terms do not exist"),
    "too-many-terms": (6, "num_terms", 17, "operation 6: terms do not exist"),
    "no-taps": (0, "num_taps", 0, "operation 0: a lookup needs taps"),
    "more-taps-than-the-table-has": (0, "num_taps", 2, "operation 0: a lookup needs taps"),
    "taps-that-overflow": (0, "num_taps", 2**62, "operation 0: a lookup needs taps"),
    "no-table": (0, "weights", 0, "weights: expected the address of an aligned array"),
    "misaligned-table": (0, "weights", 4099, "weights: expected the address of an aligned array"),
    "table-of-another-size": (0, "num_weights", 39, "operation 0: a lookup needs taps"),
    "empty-table": (0, "num_weights", 0, "operation 0: a lookup needs taps"),
    "no-order-above": (18, "above_level", -1, "operation 18: its order above"),
    "order-above-beyond": (6, "above_level", 19, "operation 6: its order above"),
    "order-of-what-has-no-part-above": (4, "above_level", 0, "operation 4: its order above"),
    "order-above-too-low": (6, "above_level", 0, "operation 6: a source is not known above"),
    "steps-the-same-everywhere": (6, "uniform", 1, "operation 6: what is the same everywhere is not known"),
    "places-the-same-everywhere": (18, "uniform", 1, "operation 18: what is the same everywhere reads a place"),
    "uniform-source-of-a-place": (15, "uniform", 0, "operation 17: a source is not the same everywhere"),
    "uniform-terms-beyond": (18, "first_once", 2**62, "operation 18: terms do not exist"),
    "uniform-terms-of-a-lookup": (0, "num_once", 1, "operation 0: it has no terms"),
    "terms-above-before": (18, "first_above", -1, "operation 18: terms do not exist"),
    "terms-above-of-a-gate": (2, "num_above", 1, "operation 2: it has no terms"),
    "negative-terms-above": (18, "num_above", -1, "operation 18: terms do not exist"),
    "no-bias": (18, "bias", 0, "operation 18: it needs a bias"),
    "misaligned-bias": (18, "bias", 4099, "bias: expected the address of an aligned array"),
}
# (operation, which of its terms, field, value): terms of steps, those above and those that are the same everywhere.
BROKEN_TERMS: dict[str, tuple[int, str, str, int, str]] = {
    "source-missing": (6, "first_term", "source", -1, "operation 6: a source does not exist"),
    "source-beyond": (6, "first_term", "source", 19, "operation 6: a source does not exist"),
    "source-is-itself": (6, "first_term", "source", 6, "operation 6: a source is not known"),
    "source-of-its-level": (6, "first_term", "source", 7, "operation 6: a source is not known"),
    "source-is-a-cache": (11, "first_term", "source", 9, "operation 11: only attention reads keys"),
    "reads-the-future": (6, "first_term", "first_column", 1, "operation 6: a term reads columns"),
    "no-columns": (6, "first_term", "num_columns", 0, "operation 6: a term reads columns"),
    "columns-that-overflow": (6, "first_term", "first_column", -(2**63), "operation 6: a term reads columns"),
    "too-many-columns": (6, "first_term", "num_columns", 2**62, "operation 6: a term reads columns"),
    "no-weights": (6, "first_term", "weights", 0, "weights: expected the address of an aligned array"),
    "misaligned-weights": (6, "first_term", "weights", 4097, "weights: expected the address of an aligned array"),
    "weights-of-another-size": (6, "first_term", "num_weights", 63, "operation 6: a term needs weights"),
    "source-of-another-width": (6, "first_term", "source", 1, "operation 6: a term needs weights"),
    "step-above": (6, "first_term", "first_row", -1, "operation 6: a step reads rows above"),
    "above-source-beyond": (7, "first_above", "source", 19, "operation 7: a source does not exist"),
    "above-cache": (7, "first_above", "source", 9, "operation 7: only attention reads keys"),
    "above-static": (7, "first_above", "source", 15, "operation 7: a term needs weights"),
    "above-own-row": (7, "first_above", "first_row", -1, "operation 7: a source is not known above"),
    "above-below": (7, "first_above", "first_row", 0, "operation 7: a term reads rows"),
    "above-rows-that-overflow": (7, "first_above", "first_row", -(2**63), "operation 7: a term reads rows"),
    "above-columns-that-overflow": (7, "first_above", "first_column", -(2**63), "operation 7: a term reads rows"),
    "above-no-rows": (7, "first_above", "num_rows", 0, "operation 7: a term reads rows"),
    "above-more-rows": (7, "first_above", "num_rows", 3, "operation 7: a term needs weights"),
    "above-fewer-columns": (7, "first_above", "num_columns", 2, "operation 7: a term needs weights"),
    "above-weights-of-another-size": (7, "first_above", "num_weights", 383, "operation 7: a term needs weights"),
    "tap-of-a-source": (0, "first_above", "source", 3, "operation 0: a tap above needs"),
    "tap-in-the-own-row": (0, "first_above", "first_row", 0, "operation 0: a tap above needs"),
    "tap-that-overflows": (0, "first_above", "first_column", -(2**63), "operation 0: a tap above needs"),
    "tap-of-another-size": (0, "first_above", "num_weights", 39, "operation 0: a tap above needs"),
    "uniform-source-is-a-place": (17, "first_once", "source", 16, "operation 17: a term needs weights"),
    "uniform-source-is-itself": (18, "first_once", "source", 18, "operation 18: a source is not the same"),
    "uniform-window": (18, "first_once", "first_column", -1, "operation 18: a source is not the same"),
}
BROKEN_SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "no-operations": ({"num_ops": 0}, "num_ops: expected"),
    "too-many-operations": ({"num_ops": 2**40}, "num_ops: expected"),
    "negative-terms": ({"num_terms": -1}, "num_terms: expected"),
    "null-operations": ({"ops": 0}, "ops: expected the address of an aligned array, got 0"),
    "misaligned-operations": ({"ops": 4100}, "ops: expected the address of an aligned array, got 4100"),
    "null-terms": ({"terms": 0}, "terms: expected the address of an aligned array, got 0"),
    "output-missing": ({"output": -1}, "output: expected"),
    "output-beyond": ({"output": 19}, "output: expected"),
    "output-of-another-width": ({"output": 13}, "output: expected"),
    "no-height": ({"height": 0}, "shape: expected"),
    "no-width": ({"width": 0}, "shape: expected"),
    "endless-grid": ({"height": 2**62, "width": 4}, "shape: expected"),
    "no-codes": ({"num_codes": 0}, "shape: expected"),
    "codes-unlike-the-table": ({"num_codes": 6}, "operation 0: a lookup needs taps"),
    "unknown-kernels": ({"kernels": "mmx"}, "kernels: expected auto, or avx512, avx2 or baseline"),
}
BROKEN_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "negative-batch": ({"batch": -1}, "batch: expected"),
    "batch-that-overflows": ({"batch": 2**62}, "batch: expected"),
    "no-tile": ({"tile": 0}, "tile: expected 1 to the width"),
    "tile-beyond-the-width": ({"tile": WIDTH + 1}, "tile: expected 1 to the width"),
    "tile-and-attention": ({"tile": 1, "offset": WIDTH}, "tile: attention reads all positions"),
    "no-offset": ({"offset": 0}, "offset: expected 1 to the width"),
    "offset-that-overflows": ({"offset": 2**63 - 1}, "offset: expected 1 to the width"),
    "no-threads": ({"threads": 0}, "threads: expected"),
    "too-many-threads": ({"threads": 2**40}, "threads: expected"),
    "no-step-threads": ({"step_threads": 0}, "threads: expected"),
    "more-step-threads": ({"step_threads": 2}, "threads: expected"),
    **{
        f"{fault}-{name}": ({name: address}, f"{name}: expected the address of an aligned array, got {address}")
        for name in ("statics", "codes", "uniforms")
        for fault, address in (("null", 0), ("misaligned", 4099))
    },
    "null-known": ({"known": 0}, "known: expected the address"),
    "misaligned-logits": ({"logits": 4099}, "logits: expected the address"),
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
    for tables in (Tables(), Tables(attention=False)):
        plan = tables.make()
        assert plan.weight_bytes > 0
        assert plan.kernels in ("avx512", "avx2", "baseline")
        assert isinstance(plan.fused, bool)
        filled = []
        for threads in (1, 3):
            grid = Grid(tables)
            assert grid.run(plan, threads=threads, step_threads=threads) is None
            assert grid.rows == [1] * HEIGHT
            assert np.isfinite(grid.logits).all()
            filled.append(grid.logits)
        assert np.array_equal(*filled)
    tables = Tables()
    tables.ops[10]["inclusive"] = 1
    assert Grid(tables).run(tables.make()) is None


def test_tiles_and_offsets() -> None:
    tables = Tables(attention=False)
    plan = tables.make()
    whole = Grid(tables)
    assert whole.run(plan) is None
    for tile, least in ((1, 2), (2, 2), (3, 2), (WIDTH, 1)):
        grid = Grid(tables)
        assert grid.run(plan, tile=tile, offset=least) is None
        assert np.array_equal(grid.codes, whole.codes)
        assert np.array_equal(grid.logits, whole.logits)
        assert sum(grid.rows) == HEIGHT
        assert plan.memory_bytes(2 * BATCH, tile, least) == 2 * plan.memory_bytes(BATCH, tile, least) > 0
        if least > 1:
            for refused in (grid.run, lambda _, **front: plan.memory_bytes(BATCH, **front)):
                with pytest.raises(ValueError, match="^offset: a position would be read before it is known"):
                    refused(plan, tile=tile, offset=least - 1)
    for batch in (-1, 2**62):
        with pytest.raises(ValueError, match="^batch: expected"):
            plan.memory_bytes(batch, WIDTH, 1)


@pytest.mark.parametrize(("op", "field", "value", "message"), BROKEN_OPS.values(), ids=BROKEN_OPS)
def test_refuses_operations(op: int, field: str, value: int, message: str) -> None:
    tables = Tables()
    if field.startswith("sources"):
        tables.ops[op]["sources"][int(field[-1])] = value
    else:
        tables.ops[op][field] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        tables.make()


@pytest.mark.parametrize(("op", "which", "field", "value", "message"), BROKEN_TERMS.values(), ids=BROKEN_TERMS)
def test_refuses_terms(op: int, which: str, field: str, value: int, message: str) -> None:
    tables = Tables()
    tables.terms[tables.ops[op][which]][field] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        tables.make()


def test_inclusive_attention_needs_keys_and_values_of_its_own_position() -> None:
    tables = Tables()
    tables.ops[8]["level"] = 3  # soon enough for strict attention, which reads earlier positions
    assert Grid(tables).run(tables.make()) is None
    tables.ops[10]["inclusive"] = 1
    with pytest.raises(ValueError, match="^operation 10: a source is not known at its level"):
        tables.make()


@pytest.mark.parametrize(("changes", "message"), BROKEN_SHAPES.values(), ids=BROKEN_SHAPES)
def test_refuses_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Tables().make(**changes)


@pytest.mark.parametrize(("changes", "message"), BROKEN_RUNS.values(), ids=BROKEN_RUNS)
def test_refuses_runs(changes: dict[str, Any], message: str) -> None:
    tables = Tables()
    grid = Grid(tables)
    with pytest.raises(ValueError, match=f"^{message}"):
        grid.run(tables.make(), **changes)
    assert not grid.codes.any()
    assert not grid.rows


@pytest.mark.parametrize("address", [0, 4099])
def test_refuses_static_vectors_that_lie_nowhere(address: int) -> None:
    tables = Tables()
    grid = Grid(tables)
    grid.statics[16]["data"] = address
    with pytest.raises(ValueError, match=f"^statics: expected the address of an aligned array, got {address}"):
        grid.run(tables.make())


@pytest.mark.parametrize("code", [-1, CODES, 2**40])
def test_refuses_known_codes_out_of_range(code: int) -> None:
    tables = Tables()
    plan, grid = tables.make(), Grid(tables)
    grid.codes[1, 1, 2] = code
    assert grid.run(plan) is None  # not known: never read, and drawn
    assert 0 <= grid.codes[1, 1, 2] < CODES
    grid.codes[1, 1, 2] = code
    grid.known[1, 1, 2] = True
    with pytest.raises(ValueError, match="^codes: expected known codes of 0 to num_codes - 1"):
        grid.run(plan)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), float("inf")])
def test_reports_where_nothing_can_be_drawn(value: float, threads: int) -> None:
    tables = Tables(attention=False)
    plan = tables.make()
    for front in ({}, {"tile": 2, "offset": 2}):
        grid = Grid(tables)
        grid.uniforms[1, 2, 1] = value
        assert grid.run(plan, **front, threads=threads, step_threads=threads) == (1, 2, 1)
        assert sum(grid.rows) <= 2
    grid = Grid(tables)
    grid.context.reshape(-1)[: BATCH * HEIGHT * WIDTH * 3].reshape(BATCH, HEIGHT, WIDTH, 3)[1, 1, 3] = np.nan
    tables.terms[tables.ops[11]["first_term"]]["source"] = 6  # which the context gets to
    assert grid.run(tables.make(), threads=threads, step_threads=threads) == (1, 1, 3)
    assert grid.rows == [1]


def test_what_a_callback_raises_ends_the_call() -> None:
    tables = Tables()
    grid = Grid(tables)

    def stop(rows: int) -> None:
        grid.rows.append(rows)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        grid.run(tables.make(), rows_complete=stop)
    assert grid.rows == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"tile": "0"},
        {"tile": 1.5},
        {"codes": None},
        {"temperature": "hot"},
        {"top_k": 2**70},
        {"codes": -8},
        {"rows_complete": 3},
    ],
)
def test_refuses_other_types(changes: dict[str, Any]) -> None:
    tables = Tables()
    with pytest.raises(TypeError):
        Grid(tables).run(tables.make(), **changes)


@pytest.mark.parametrize("name", ["op", "term", "static"])
def test_a_changed_layout_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The structs of the extension are those that Python fills in, field by field."""
    layout = _engine.require().PLAN_LAYOUT
    size, fields = layout[name]
    swapped = [(fields[1][0], fields[0][1]), (fields[0][0], fields[1][1]), *fields[2:]]
    for changed in ((size + 8, fields), (size, fields[:-1]), (size, swapped)):
        other = types.SimpleNamespace(PLAN_LAYOUT={**layout, name: changed})
        monkeypatch.setattr(_engine, "require", lambda other=other: other)
        with pytest.raises(AssertionError, match=f"^{name}: the extension has"):
            step_tables.kind_numbers.__wrapped__()
    monkeypatch.undo()
    assert step_tables.kind_numbers.__wrapped__() == step_tables.kind_numbers()


def test_broken_tables_are_refused_or_run() -> None:
    """In a process of its own, see there."""
    program = Path(__file__).parents[1] / "grid_tables.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, run = map(int, done.stdout.split())
    assert refused > 500
    assert run > 100
