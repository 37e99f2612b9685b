"""The table of benchmarks/head_gpu.py's results as Markdown."""

from pathlib import Path
from typing import Any

COLUMNS = ("ms", "host ms", "TFLOP/s", "over its GEMMs", "ours over it", "peak GiB")


def write_table(parts: dict[str, Any], machine: dict[str, Any], path: Path) -> None:
    """One section for each part; a provider that was left out stands there with its reason."""
    line = ", ".join(f"{k} {v}" for k, v in machine.items())
    out = ["# LM head on a GPU", "", line, ""]
    for part, found in parts.items():
        out += [f"## {part}", "", _about(found), ""]
        out += ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        out += [_row(name, row) for name, row in found["providers"].items()]
        out.append("")
    path.write_text("\n".join(out))


def _about(found: dict[str, Any]) -> str:
    batch = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in found["batch"].items())
    return (
        f"GEMMs: {found['gemm_count']}; {batch}; log-probs within {found['error_nats']:.1e} nats "
        "of float64."
    )


def _row(name: str, row: dict[str, Any]) -> str:
    if "left_out" in row:
        return f"| {name} | {row['left_out']} |" + " |" * (len(COLUMNS) - 1)
    cells = [
        f"{row['ms']:.2f}",
        _cell(row.get("host_ms"), ".2f"),
        f"{row['tflops']:.0f}",
        _cell(row.get("over_gemms"), ".3f"),
        _cell(1 / row["over_ours"] if row.get("over_ours") else None, ".3f"),
        f"{row['peak_gib']:.2f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
