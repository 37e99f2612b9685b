"""The writer of result files: ``benchmarks/results/<name>.json`` with the machine line inside."""

import json
from pathlib import Path
from typing import Any

from dpo_fast.bench.machine import machine_line

__all__ = ["RESULTS", "machine_line", "write_result"]

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, payload: dict[str, Any], device: str = "cpu") -> Path:
    """Write a result of this clone and return where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_line(device), **payload}, indent=1) + "\n")
    return path
