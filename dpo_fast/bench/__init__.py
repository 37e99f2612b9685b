"""Benchmarks against the naive path and the peers: ``python -m benchmarks`` in a clone.

:func:`run` is the entry for other code; everything else in here is its inside.
"""

from dpo_fast.bench.run import DEVICES, SUITES, run

__all__ = ["DEVICES", "SUITES", "run"]
