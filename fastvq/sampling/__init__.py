"""Sampling: the naive definition, the public call, and pipelines of several levels."""

from fastvq.sampling.api import sample
from fastvq.sampling.cost import Explanation, describe, explain
from fastvq.sampling.engines import choose_engine
from fastvq.sampling.noise import uniforms
from fastvq.sampling.options import ENGINES, EngineOptions
from fastvq.sampling.pipeline import Pipeline, Samples, shipped

__all__ = [
    "ENGINES",
    "EngineOptions",
    "Explanation",
    "Pipeline",
    "Samples",
    "choose_engine",
    "describe",
    "explain",
    "sample",
    "shipped",
    "uniforms",
]
