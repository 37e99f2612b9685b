"""The line that says on what a number was measured."""

import hashlib
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Line = dict[str, str | int]


def machine_line(device: str = "cpu") -> Line:
    """CPU or GPU, threads, versions, commit, date; no host name, no path."""
    line: Line = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }
    for package in ("triton", "transformers", "trl"):
        line[package] = package_version(package)
    if device == "cuda":
        line["gpu"] = torch.cuda.get_device_name()
        line["cuda"] = torch.version.cuda or "?"
        line["driver"] = _driver()
    return line


def package_version(package: str) -> str:
    """The installed version, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def sources() -> str:
    """Fingerprint of the code that runs: this package and the kernels, their compiled form aside.

    Two results of one fingerprint belong together, whatever was committed in between.
    """
    import dpo_fast_kernels

    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(dpo_fast_kernels.__file__).parent):
        for path in sorted(package.rglob("*")):
            if path.suffix in (".py", ".json", ".cpp"):
                digest.update(str(path.relative_to(package)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the code that is measured; "-dirty" if anything but results differs from it.

    DPO_FAST_COMMIT names it where the history here is not that of the sources (a copy on another
    machine). Outside a clone: the version of the package.
    """
    if named := os.environ.get("DPO_FAST_COMMIT"):
        return named
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return f"dpo-fast {package_version('dpo-fast')}"
    changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return head + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
