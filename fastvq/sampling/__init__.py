"""Sampling: the naive definition, the public call, and pipelines of several levels."""

from typing import Any

from fastvq.sampling.api import sample
from fastvq.sampling.cost import Explanation, describe, explain
from fastvq.sampling.engines import choose_engine, engine_names
from fastvq.sampling.noise import uniforms
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.pipeline import Pipeline, Samples, shipped

ENGINES: tuple[str, ...]

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


def __getattr__(name: str) -> Any:
    if name == "ENGINES":
        return engine_names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
