"""Benchmarks against the naive path and the peers: ``python -m benchmarks``; see LEDGER.md.

The suites live in ``dpo_fast.bench``, so that an installed package has them too; here are the
commands of a clone, and ``results/``, what was measured.
"""

from dpo_fast.bench import DEVICES, SUITES, run

__all__ = ["DEVICES", "SUITES", "run"]
