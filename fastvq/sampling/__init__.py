"""Sampling: the naive definition, the public call, and pipelines of several levels."""

from fastvq.sampling.api import ENGINES, choose_engine, sample
from fastvq.sampling.noise import uniforms
from fastvq.sampling.pipeline import Pipeline, Samples, shipped

__all__ = ["ENGINES", "Pipeline", "Samples", "choose_engine", "sample", "shipped", "uniforms"]
