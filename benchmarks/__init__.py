"""Benchmarks against the naive path and the peers. ``python -m benchmarks.<name>``."""
