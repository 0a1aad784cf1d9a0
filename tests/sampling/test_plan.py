"""The plan compiler: when operations run, what they read, and when a plan is made anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from engine_helpers import EPS, grids, model_logits, spread
from helpers import TablePrior, pixelcnn, refuses, snail
from plan_priors import GIVEN, PRIORS, every_given, every_prior
from torch import nn

import fastvq
from fastvq.errors import UnavailableError
from fastvq.models import Prior
from fastvq.ops.draw import draw_margin
from fastvq.sampling import sample, uniforms
from fastvq.sampling.engines import plan_of
from fastvq.sampling.engines.pytorch import TorchGrid
from fastvq.sampling.plan import Op, Plan, Term, compile_plan

pytestmark = pytest.mark.usefixtures("steady")


def spatial(plan: Plan, timing: str) -> list[Op]:
    """Affine operations of this timing that read other positions."""
    return [
        op
        for op in plan.ops
        if plan.timing[op.index] == timing and any(set(term.taps) != {(0, 0)} for term in op.terms)
    ]


@pytest.mark.parametrize("attention", [True, False])
@every_given
def test_strict_convolutions_are_one_level(attention: bool, told: str) -> None:
    plan = compile_plan(snail(blocks=3, layers_per_block=2, attention=attention, **GIVEN[told]))
    left = spatial(plan, "left")
    assert len(left) == 12  # 2 in each gated layer
    assert {plan.level[op.index] for op in left} == {0}
    assert spatial(plan, "here") == spatial(plan, "row") == []
    taps = {tap for op in left for term in op.terms for tap in term.taps if term.source in plan.history}
    assert max(taps) == (0, -1)


def test_inclusive_convolutions_wait_for_each_other() -> None:
    plan = compile_plan(snail(mask="inclusive", blocks=2, layers_per_block=3, attention=False))
    here = spatial(plan, "here")
    assert len(here) == 12
    assert spatial(plan, "left") == spatial(plan, "row") == []
    levels = [plan.level[op.index] for op in here]
    assert levels == sorted(set(levels))
    assert levels[0] > 0


@every_given
def test_the_vertical_stack_is_row_work(told: str) -> None:
    plan = compile_plan(pixelcnn(layers=3, **GIVEN[told]))
    assert len(spatial(plan, "row")) == len(spatial(plan, "here")) == 3
    assert all(
        dr < 0 or plan.timing[term.source] == "row"
        for op in spatial(plan, "row")
        for term in op.terms
        for dr, _ in term.taps
    )
    lookups = {plan.timing[op.index] for op in plan.ops if op.kind == "lookup"}
    assert lookups == {"row", "left"}


def levels_of(**changes: Any) -> int:
    return compile_plan(snail(**changes)).num_levels


@pytest.mark.parametrize("attention", [True, False])
def test_levels(attention: bool) -> None:
    strict: dict[str, Any] = {"attention": attention}
    by_blocks = [levels_of(blocks=blocks, **strict) for blocks in (1, 2, 3, 4)]
    steps = {after - before for before, after in itertools.pairwise(by_blocks)}
    assert len(steps) == 1
    assert min(steps) > 0
    assert levels_of(layers_per_block=4, **strict) == levels_of(layers_per_block=1, **strict)
    chain = [levels_of(mask="inclusive", layers_per_block=layers, **strict) for layers in (1, 2, 3, 4)]
    assert [after - before for before, after in itertools.pairwise(chain)] == [2, 2, 2]
    assert levels_of(output_blocks=2, **strict) == levels_of(**strict) + 4
    cnn = [compile_plan(pixelcnn(layers=layers)).num_levels for layers in (1, 2, 3)]
    assert cnn[2] - cnn[1] == cnn[1] - cnn[0] == 2


def taps_of(terms: Iterable[Term]) -> list[tuple[int, tuple[int, int], bytes]]:
    """Source, tap and weights of every product."""
    return sorted(
        (term.source, tap, matrix.numpy().tobytes())
        for term in terms
        for tap, matrix in zip(term.taps, term.weight, strict=True)
    )


@every_prior
@every_given
def test_plans_are_whole(kind: str, told: str) -> None:
    """Every operation is read, every tap is in one of the phases, and nothing is read before it is known."""
    plan = compile_plan(PRIORS[kind](**GIVEN[told]))
    read = {plan.output}
    for op in plan.ops:
        read |= {*op.sources, *(term.source for term in op.terms)}
        here = [*op.sources, *(term.source for term in op.terms if (0, 0) in term.taps)]
        assert all(source < op.index for source in here)
        if op.kind == "affine":
            row, step = plan.row_terms[op.index], plan.step_terms[op.index]
            assert taps_of((*row, *step)) == taps_of(op.terms)
            assert all(dr == 0 and plan.timing[t.source] != "row" for t in step for dr, _ in t.taps)
            assert (plan.timing[op.index] == "row") == (not step)
    assert read == set(range(len(plan.ops)))
    assert {op.index for op in plan.step_ops()} == {op.index for op in plan.ops if plan.level[op.index] >= 0}


@pytest.mark.parametrize("kind", sorted(PRIORS))
def test_a_plan_lies_where_the_prior_does(kind: str) -> None:
    """Also the biases that a prior does not have: kernels take all of them from one device."""
    plan = compile_plan(PRIORS[kind](**GIVEN["labels"]).to("meta"))
    found = [tensor for op in plan.ops for tensor in (op.bias, op.weight, *(term.weight for term in op.terms))]
    assert {tensor.device.type for tensor in found if tensor is not None} == {"meta"}


def test_what_nothing_reads_is_dropped() -> None:
    """The vertical stack has no use for the last layer's gate, nor for the context that would go into it."""
    layers = 3
    plan = compile_plan(pixelcnn(layers=layers, num_classes=3))
    assert sum(op.variant == "tanh" for op in plan.ops) == 2 * (layers + 1) - 1
    assert not any(op.variant == "background" for op in plan.ops)
    assert not any(op.variant in ("background", "context") for op in compile_plan(pixelcnn()).ops)


@pytest.mark.parametrize(
    ("form", "mask", "kernel", "above", "columns"),
    [
        ("rows", "strict", 5, 4, range(-2, 0)),
        ("rows", "inclusive", 5, 4, range(-2, 1)),
        ("symmetric", "strict", 7, 3, range(-3, 0)),
        ("rows", "strict", 2, 1, range(-1, 0)),
        ("symmetric", "inclusive", 4, 2, range(-2, 1)),
    ],
)
def test_taps_of_a_causal_kernel(form: str, mask: str, kernel: int, above: int, columns: Iterable[int]) -> None:
    prior = snail(form=form, mask=mask, kernel_size=kernel, attention=False)
    plan = compile_plan(prior)
    op = next(op for op in plan.ops if any(len(term.taps) > 1 for term in op.terms))
    (row,), (step,) = plan.row_terms[op.index], plan.step_terms[op.index]
    assert set(step.taps) == {(0, column) for column in columns}
    reach = range(-(kernel // 2), kernel - kernel // 2)
    assert set(row.taps) == {(dr, dc) for dr in range(-above, 0) for dc in reach}
    weight = prior.blocks[0].layers[0].conv1.weight
    for term in (row, step):
        for (dr, dc), matrix in zip(term.taps, term.weight, strict=True):
            assert torch.equal(matrix, weight[:, :, dr + above, dc + kernel // 2].T)
    history = plan.history[step.source]
    assert (history.above, history.left, history.right) == (above, kernel // 2, max(reach))


@pytest.mark.parametrize("kind", ["strict", "pixelcnn"])
def test_what_a_label_alone_decides_is_worked_out_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = PRIORS[kind](num_classes=3)
    plan = plan_of(prior)
    calls = dict.fromkeys(range(len(plan.ops)), 0)

    def count(name: str) -> None:
        work = getattr(TorchGrid, name)

        def counted(self: TorchGrid, op: Op) -> Any:
            calls[op.index] += 1
            return work(self, op)

        monkeypatch.setattr(TorchGrid, name, counted)

    count("_uniform_value")
    count("_value_above")
    sample(prior, 2, label=1, seed=0, engine="torch")
    uniform = [op.index for op in plan.ops if op.index in plan.uniform]
    assert len(uniform) == (1 if kind == "strict" else 4)  # the label itself, and what v takes from it in each layer
    assert all(calls[index] == 1 for index in uniform)
    others = {calls[op.index] for op in plan.row_ops() if op.index not in plan.uniform}
    assert others == {prior.config.shape[0]}


def test_only_known_priors_have_a_plan() -> None:
    prior = TablePrior((2, 3), 4)
    with refuses(UnavailableError, "no plan is known for a TablePrior"):
        compile_plan(prior)
    with refuses(UnavailableError, "no plan is known"):
        fastvq.explain(prior)


# When a plan is made anew.


def optimise(prior: Prior) -> None:
    codes, given = grids(prior, 2)
    prior.nll(codes, **given).mean().backward()
    torch.optim.SGD(prior.parameters(), lr=0.5).step()


def replace(prior: Any) -> None:
    prior.output.weight = nn.Parameter(-prior.output.weight.detach())


def in_place(prior: Any) -> None:
    with torch.no_grad():
        prior.output.weight.neg_()


CHANGES: dict[str, Callable[[Any], object]] = {
    "optimiser": optimise,
    "in-place": in_place,
    "load-state-dict": lambda p: p.load_state_dict({k: -v for k, v in p.state_dict().items()}),
    "load-and-assign": lambda p: p.load_state_dict({k: -v for k, v in p.state_dict().items()}, assign=True),
    "data-replaced": lambda p: setattr(p.output.weight, "data", -p.output.weight.data),
    "through-data": lambda p: p.output.weight.data.neg_(),
    "parameter-replaced": replace,
    "module-replaced": lambda p: setattr(p, "output", spread(PRIORS["strict"](), 9).output),
    "buffer": lambda p: p.background.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_follows_changes(change: str) -> None:
    prior = spread(PRIORS["strict"]())
    before = plan_of(prior)
    codes = sample(prior, 8, seed=1)
    assert plan_of(prior) is before
    CHANGES[change](prior)
    noise = uniforms(1, 0, 8, prior.config.shape)
    for engine in ("torch", "auto"):
        after = sample(prior, 8, seed=1, engine=engine)
        assert not torch.equal(after, codes)
        assert draw_margin(model_logits(prior, after, {}), noise, after).min() >= -EPS
    assert plan_of(prior) is not before


def test_follows_data_replaced_over_and_over() -> None:
    """An address that was in use before may come back."""
    prior: Any = spread(PRIORS["strict"]())
    plans = []
    for _ in range(20):
        prior.output.weight.data = prior.output.weight.data * 1.01
        plans.append(plan_of(prior))
        assert torch.equal(plans[-1].ops[-1].terms[0].weight[0], prior.output.weight.detach()[:, :, 0, 0].T)
    assert len({id(plan) for plan in plans}) == 20


def test_follows_changes_in_inference_mode() -> None:
    with torch.inference_mode():
        prior: Any = spread(PRIORS["strict"]())
        before = plan_of(prior)
        assert plan_of(prior) is before
        prior.output.weight.neg_()
        assert plan_of(prior) is not before
    assert sample(prior, 2, seed=1).shape == (2, 3, 4)


def test_stays_the_same_otherwise() -> None:
    prior = spread(PRIORS["strict"]())
    before = plan_of(prior)
    prior.train()
    codes, _ = grids(prior, 2)
    prior.nll(codes).mean().backward()
    sample(prior, 3, seed=1, temperature=0.5)
    prior.eval().requires_grad_(False)
    assert plan_of(prior) is before
    assert plan_of(spread(PRIORS["strict"]())) is not before
