"""``python -m benchmarks``: the suites, written to benchmarks/results (``--quick``: runs/bench)."""

import sys
from pathlib import Path

from dpo_fast.bench.command import main

if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    sys.exit(main(prog="python -m benchmarks", results=results))
