"""Priors of one's own: anything that gives logits for codes, traced into a plan where that is possible."""

from fastvq.sampling.own.builder import PlanBuilder
from fastvq.sampling.own.causal import CausalReport, Leak, require_causal
from fastvq.sampling.own.check import check_causal
from fastvq.sampling.own.kept import as_own_prior
from fastvq.sampling.own.prior import OwnPrior
from fastvq.sampling.own.trace import trace, with_plan

__all__ = [
    "CausalReport",
    "Leak",
    "OwnPrior",
    "PlanBuilder",
    "as_own_prior",
    "check_causal",
    "require_causal",
    "trace",
    "with_plan",
]
