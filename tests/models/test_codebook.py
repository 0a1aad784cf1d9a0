"""What a quantiser has and hands on: its codebook, under names that stay, and the assignments of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantizer_helpers import BUFFERS, EACH_LAYOUT, buffers, normal, same

from fastvq.models import ResidualVQ, VectorQuantizer
from fastvq.models.quantizer import Codebook


def make(**options: Any) -> VectorQuantizer:
    torch.manual_seed(3)
    return VectorQuantizer(7, 2, **options)


@EACH_LAYOUT
def test_start_move_and_lookup_are_what_passes_do(options: dict[str, Any]) -> None:
    by_pass, by_hand = (make(init="data", revive_below=0.2, **options).train() for _ in range(2))
    x = normal(40, 2 * by_pass.heads)
    torch.manual_seed(5)
    out = by_pass(x)
    torch.manual_seed(5)
    codebook, vectors = by_hand.codebook, by_hand.arrange(x, None)
    codebook.start(vectors.searched)
    found = by_hand.assign(vectors, by_hand.open_pass(vectors, freeze_codebook=True))
    assert torch.equal(found.codes.view_as(out.codes), out.codes)
    table = codebook.table.clone()
    chosen = codebook.lookup(out.codes).reshape(x.shape)
    torch.testing.assert_close(chosen, out.quantized)
    used = codebook.move(found.statistics.counts[None], found.statistics.sums, vectors.searched)
    assert int((used == 0).sum()) == int(out.dead_codes)
    assert same(buffers(by_hand), buffers(by_pass))
    assert torch.equal(codebook.lookup(out.codes, table).reshape(x.shape), chosen)


@pytest.mark.parametrize("learnable", [False, True], ids=["averages", "learnt"])
def test_the_state_lies_in_the_quantiser_under_its_names(learnable: bool) -> None:
    quantizer = make(learnable_codebook=learnable)
    names = [name for name in BUFFERS if not (learnable and name == "embedding_sum")]
    assert sorted(quantizer.state_dict()) == sorted(names)
    assert {name for name, _ in [*quantizer.named_buffers(), *quantizer.named_parameters()]} == set(names)
    assert set(ResidualVQ(2, 7, 2).state_dict()) == {f"levels.{level}.{name}" for level in range(2) for name in BUFFERS}
    quantizer.embedding = torch.nn.Parameter(normal(7, 2)) if learnable else normal(7, 2)
    quantizer.decay, quantizer.revive_below, quantizer.init = 0.5, 2.0, "kmeans"
    codebook = quantizer.codebook
    assert isinstance(codebook, Codebook)
    assert codebook.embedding is quantizer.embedding
    assert (codebook.decay, codebook.revive_below, codebook.init) == (0.5, 2.0, "kmeans")
    with torch.no_grad():
        state = {name: torch.full_like(value, 3) for name, value in quantizer.state_dict().items()}
        out = torch.func.functional_call(quantizer.eval(), state, (normal(5, 2),))
    assert torch.equal(out.quantized, torch.full((5, 2), 3.0))
