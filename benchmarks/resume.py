"""Results in parts: what the same sources measured on the same GPU is not measured again.

A result belongs to its sources rather than to a commit: a machine with a GPU may have neither git
nor a clean tree.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine_line, write_result

ROOT = Path(__file__).parents[1]
FOLDERS = ("dpo_fast", "kernels", "csrc", "benchmarks", "tests/kernels")
SUFFIXES = (".py", ".json", ".cpp", ".cu", ".h")


def sources(root: Path = ROOT) -> str:
    """Fingerprint of the code that runs; results are no part of it."""
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and "results" not in path.parts:
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def load_parts(name: str) -> dict[str, Any]:
    """What :func:`save_parts` left of these sources, GPU and versions; else nothing."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    found, now = json.loads(path.read_text()), machine_line("cuda")
    line = found["machine"]
    same = all(line.get(field) == now.get(field) for field in ("gpu", "torch", "triton"))
    parts: dict[str, Any] = found["parts"] if same and found["sources"] == sources() else {}
    return parts


def save_parts(name: str, parts: dict[str, Any]) -> None:
    """All parts so far, with the machine line and the fingerprint."""
    write_result(name, {"sources": sources(), "parts": parts}, "cuda")
