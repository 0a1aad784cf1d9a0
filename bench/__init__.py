"""Benchmarks: one list of cases, one harness, one report. ``pytest bench/ --benchmark`` runs them."""
