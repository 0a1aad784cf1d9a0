"""Sampling: the naive definition, the public call, and pipelines of several levels."""

from typing import Any

from fastvq._shards import Shard
from fastvq.sampling.api import sample
from fastvq.sampling.autoencoder import Autoencoder
from fastvq.sampling.coding import frames
from fastvq.sampling.cost import Explanation, describe, explain
from fastvq.sampling.engines import choose_engine, engine_names
from fastvq.sampling.noise import uniforms
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.own import CausalReport, Leak, OwnPrior, PlanBuilder, check_causal, trace, with_plan
from fastvq.sampling.parts import merge_samples, sample_shard
from fastvq.sampling.pipeline import Pipeline, shipped
from fastvq.sampling.samples import Samples

ENGINES: tuple[str, ...]

__all__ = [
    "ENGINES",
    "Autoencoder",
    "CausalReport",
    "EngineOptions",
    "Explanation",
    "Leak",
    "OwnPrior",
    "Pipeline",
    "PlanBuilder",
    "Samples",
    "Shard",
    "check_causal",
    "choose_engine",
    "describe",
    "explain",
    "frames",
    "merge_samples",
    "sample",
    "sample_shard",
    "shipped",
    "trace",
    "uniforms",
    "with_plan",
]


def __getattr__(name: str) -> Any:
    if name == "ENGINES":
        return engine_names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
