"""What the compiled engines are told of a plan: tables of operations, and where their vectors lie in each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stand_in import BATCH, Job, floats
from engine_helpers import (
    spread,
)
from helpers import snail
from plan_priors import GIVEN, PRIORS, every_given, every_prior
from torch import Tensor

from fastvq.sampling.engines.state import GridState
from fastvq.sampling.engines.step_tables import PlanTables, fill_views, make_scratch
from fastvq.sampling.plan import Plan, compile_plan

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture
def inference() -> Iterator[None]:
    """As `fill` runs engines."""
    with torch.inference_mode():
        yield


@pytest.mark.usefixtures("inference")
@every_prior
@every_given
def test_views(kind: str, told: str) -> None:
    """Every view leads to where the state has what it should, whatever the column."""
    prior = spread(PRIORS[kind](**GIVEN[told]))
    job = Job(prior)
    plan, state = job.compiled.plan, job.state
    tables = PlanTables(plan, above=False)
    height, width = plan.shape
    scratch = make_scratch(state, places=2)
    state.codes.random_(plan.num_codes)
    views = np.full((2, len(tables.ops), 4), -7, dtype=np.int64)
    masks = set()
    for row in range(height):
        state.begin_row(row)
        kept = fill_views(views, tables, state, scratch, row)
        for index, (address, batch_stride, column_stride, mask) in enumerate(views[0].tolist()):
            if index >= len(plan.ops):
                continue
            op = plan.ops[index]
            for sample_index in range(BATCH):
                for column in range(width):
                    found = address + 4 * (sample_index * batch_stride + (column & mask) * column_stride)
                    want = place_of(state, plan, scratch, index, sample_index, row, column, kept)
                    if isinstance(want, int):
                        assert found == want, (op, sample_index, column)
                    else:
                        assert np.array_equal(floats(found, op.channels), want.numpy())
            masks.add((op.index in scratch, mask))
        for op in plan.ops:
            address, batch_stride, column_stride, mask = views[1, op.index].tolist()
            started = plan.level[op.index] >= 0 and op.kind in ("affine", "lookup")
            assert (address != 0) == started
            for sample_index in range(BATCH if started else 0):
                for column in range(width):
                    found = address + 4 * (sample_index * batch_stride + (column & mask) * column_stride)
                    rows = state.rows[op.index]
                    want = rows[sample_index, column if rows.shape[1] > 1 else 0]
                    assert np.array_equal(floats(found, op.channels), want.numpy())
        for key, index in tables.key_stores.items():
            cache = state.keys[key]
            assert views[0, index].tolist() == [cache.data_ptr(), cache.stride(0), 0, 0]
    assert (True, -1) not in masks
    assert (True, 0) not in masks
    assert (False, 1) not in masks
    assert (True, 1) in masks


def place_of(
    state: GridState, plan: Plan, scratch: dict[int, Tensor], index: int, b: int, row: int, column: int, kept: Any
) -> int | Tensor:
    """The address of an operation's vector, or what it holds where the row phase has worked it out."""
    if plan.level[index] < 0:
        rows = state.rows[index]
        return rows[b, column if rows.shape[1] > 1 else 0]
    if index in state.rings:
        ring = state.rings[index]
        return ring.data[b, ring.slot, ring.left + column].data_ptr()
    if index in state.values:
        return state.values[index][b, row * state.width + column].data_ptr()
    return scratch[index][column % 2, b].data_ptr()


@pytest.mark.usefixtures("inference")
@every_prior
def test_scratch_has_as_many_places_as_asked_for(kind: str) -> None:
    job = Job(PRIORS[kind]())
    for places in (1, 2):
        scratch = make_scratch(job.state, places)
        assert scratch
        for index, place in scratch.items():
            assert place.shape == (places, BATCH, job.compiled.plan.ops[index].channels)
    tables = PlanTables(job.compiled.plan, above=False)
    views = np.zeros((2, len(tables.ops), 4), dtype=np.int64)
    job.state.begin_row(0)
    scratch = make_scratch(job.state, places=1)
    kept = fill_views(views, tables, job.state, scratch, 0)
    assert kept
    for index in scratch:
        assert views[0, index, 2:].tolist() == [0, 0]


def test_tables_keep_their_weights_until_released() -> None:
    prior = spread(snail(layers_per_block=2))
    plan = compile_plan(prior)
    tables = PlanTables(plan, above=False)
    terms = [term for op in plan.ops for term in plan.step_terms.get(op.index, ())]
    assert len(tables.terms) == len(terms)
    for (source, first, columns, address, count, *rows), term in zip(tables.terms.tolist(), terms, strict=True):
        assert (source, first, columns, rows) == (term.source, term.taps[0][1], len(term.taps), [0, 1])
        assert np.array_equal(floats(address, count), term.weight.detach().flatten().numpy())
    held = list(tables._weights)
    assert held
    tables.release()
    assert tables._weights == []
