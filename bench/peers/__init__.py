"""Who takes part in the benchmarks: a module per family of operations, each registering its own when it is imported."""

from bench.peers import accelerated, before, causal, nearest_code, own, product, residual, sampler

__all__ = ["accelerated", "before", "causal", "nearest_code", "own", "product", "residual", "sampler"]
