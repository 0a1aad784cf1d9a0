"""The priors that plans are known for: each by what writes its operations, and by the parts that this reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastvq.errors import UnavailableError
from fastvq.models.prior import Prior
from fastvq.sampling.plan.analysis import schedule
from fastvq.sampling.plan.form import Plan
from fastvq.sampling.plan.graph import Graph
from fastvq.sampling.plan.recognise import Known, Part, difference

P = TypeVar("P", bound=Prior)
Write = Callable[[Graph, P], int]


@dataclass(frozen=True)
class _Writer:
    prior: type[Prior]
    write: Write[Any]
    known: Known
    why_not: Callable[[Any], str | None] | None


_WRITERS: dict[type[Prior], _Writer] = {}


def writes(
    prior: type[P],
    parts: Mapping[type[nn.Module], Mapping[str, Part]],
    *,
    also: tuple[str, ...] = (),
    why_not: Callable[[P], str | None] | None = None,
) -> Callable[[Write[P]], Write[P]]:
    """Register the function that writes a class of priors, and its subclasses, as operations of a plan.

    The function is called with a graph and a prior, and returns the index of the operation that gives the logits. It
    may read the prior's weights and configuration, but no other state of an object, which can change unnoticed.

    Args:
        parts: of the prior's own classes of modules, its own among them, the submodules that the function reads.
            Those of :mod:`fastvq.models.blocks` are known. A prior in which anything else has a say in what these
            modules compute has no plan.
        also: methods and class attributes of these classes, beside those of every module and prior, that take part in
            the computation.
        why_not: why a prior that consists of these parts has no plan all the same, or None.
    """

    def register(write: Write[P]) -> Write[P]:
        _WRITERS[prior] = _Writer(prior, write, Known(parts, also), why_not)
        return write

    return register


def _writer_of(cls: type[Prior]) -> _Writer | None:
    return next((_WRITERS[base] for base in cls.__mro__ if base in _WRITERS), None)


def has_writer(prior: Prior) -> bool:
    """Whether the prior is of a class that plans are known for, be it changed or not."""
    return _writer_of(type(prior)) is not None


def why_no_plan(prior: Prior) -> str | None:
    """Why a prior cannot be compiled, or None.

    A plan is made from weights, so whatever else has a say in the logits excludes it: methods overridden by a subclass
    or on an object, layers of other classes, hooks, and parametrisations other than weight norm.
    """
    writer = _writer_of(type(prior))
    if writer is None:
        return f"no plan is known for a {type(prior).__name__}, only the naive engine runs it"
    found = difference(prior, (writer.prior,), "", writer.known)
    if found is None and writer.why_not is not None:
        found = writer.why_not(prior)
    return None if found is None else f"{found}, which only the naive engine runs"


def compile_plan(prior: Prior) -> Plan:
    """The plan of a prior. Weights are copied in float32 as they are now.

    Raises:
        UnavailableError: something else than weights decides what this prior computes.
    """
    reason = why_no_plan(prior)
    if reason is not None:
        raise UnavailableError(reason)
    writer = _writer_of(type(prior))
    assert writer is not None
    graph = Graph(spatial_context=bool(prior.config.condition_shapes))
    with torch.no_grad():
        output = writer.write(graph, prior)
    plan = schedule(graph.ops, output, prior.config.shape, prior.config.num_codes)
    encoder = prior.context_encoder
    layers = [] if encoder is None else [encoder.inputs, encoder.blocks]
    weights = sum(weight.numel() for layer in layers for weight in layer.parameters())
    return dataclasses.replace(plan, context_weights=weights)
