"""The line that says on what a number was measured, and the writer of result files."""

import json
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine_line(device: str = "cpu") -> dict[str, str | int]:
    """CPU or GPU, cores, versions, commit, date; no host name, no path."""
    line: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }
    for package in ("triton", "transformers", "trl"):
        line[package] = _version(package)
    if device == "cuda":
        line["gpu"] = torch.cuda.get_device_name()
        line["cuda"] = torch.version.cuda or "?"
        line["driver"] = _driver()
    return line


def write_result(name: str, payload: dict[str, Any], device: str = "cpu") -> Path:
    """``benchmarks/results/<name>.json`` with the machine line inside."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_line(device), **payload}, indent=1) + "\n")
    return path


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
