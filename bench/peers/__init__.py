"""Who takes part in the benchmarks: a module per family of operations, each registering its own when it is imported."""

from bench.peers import causal, nearest_code, sampler

__all__ = ["causal", "nearest_code", "sampler"]
