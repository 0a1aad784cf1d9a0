"""Who takes part in the benchmarks: a module per family of operations, each registering its own when it is imported."""

from bench.peers import before, causal, nearest_code, product, residual, sampler

__all__ = ["before", "causal", "nearest_code", "product", "residual", "sampler"]
