"""Quantisers of other libraries before and after `fastvq.accelerate`: time, ratios; all against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import registry
from bench.accelerated import NEEDS, Accelerated, Quantising, module_of
from bench.cases import AcceleratedCase, Case, case_of
from bench.peers.accelerated import as_it_is
from fastvq import acceleration

pytestmark = pytest.mark.usefixtures("threads")


@registry.contest("accelerated quantiser")
def test_accelerated(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


@pytest.mark.parametrize("module", sorted(NEEDS))
def test_the_accelerated_module_has_been_replaced(module: str) -> None:
    pytest.importorskip(NEEDS[module][0])
    sizes = {"VectorQuantize": "n4096-k512-d64-q1", "EMAQuantizer": "n4096-k512-d64-q1"}
    case: AcceleratedCase = case_of(
        f"accelerated-{module.lower()}-{sizes.get(module, 'n12288-k1024-d128-q8')}-training"
    ).small()
    contender = registry.contender(Accelerated(case, tuned=False), "accelerated")
    assert isinstance(contender, Quantising)
    found = acceleration(contender.module).quantizers
    assert len(found) >= 1
    assert all(one.accelerated for one in found)
    assert not any(one.accelerated for one in acceleration(module_of(case)).quantizers)


def test_check_finds_what_is_wrong() -> None:
    pytest.importorskip("vector_quantize_pytorch")
    problem = Accelerated(case_of("accelerated-vectorquantize-n4096-k512-d64-q1-training").small(), tuned=False)
    contender = as_it_is(problem)
    contender.prepare()
    codes = contender.run()
    assert problem.check(contender, codes).passed
    contender.buffers()[0].embedding_sum[codes[5, 0]] -= 0.01 * contender.x[5].detach()
    assert not problem.check(contender, codes).passed
