"""The picture of benchmarks/results/head_gpu.json: time over the GEMMs alone, and memory.

python -m benchmarks.head_plot
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

OURS, FLOOR, PEER = "#1f6f8b", "#999999", "#d9822b"


def color_of(provider: str) -> str:
    return FLOOR if provider == "gemms" else OURS if provider.startswith("ours") else PEER


def panel(axis: Any, title: str, providers: dict[str, Any]) -> None:
    """One part: a bar a provider, its peak memory written behind it; what is left out, by name."""
    names = [n for n, row in providers.items() if "ms" in row]
    times = [providers[n]["ms"] for n in names]
    axis.barh(names, times, color=[color_of(n) for n in names])
    for y, name in enumerate(names):
        row = providers[name]
        text = f" {row['ms']:.1f} ms, {row['peak_gib']:.1f} GiB"
        if "over_gemms" in row and name != "gemms":
            text += f", {row['over_gemms']:.2f}x"
        axis.text(times[y], y, text, va="center", fontsize=6)
    out = [n for n in providers if n not in names]
    axis.set_title(title + (f"\nnot here: {', '.join(out)}" if out else ""), fontsize=7)
    axis.set_xlim(0, 1.75 * max(times))
    axis.invert_yaxis()
    axis.tick_params(labelsize=6)


def draw(parts: dict[str, Any], machine: dict[str, Any], path: Path) -> None:
    """All parts in a grid, four in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = min(4, len(parts))
    height = -(-len(parts) // width)
    figure, axes = plt.subplots(height, width, figsize=(4 * width, 2.4 * height), squeeze=False)
    for axis, (name, part) in zip(axes.flat, parts.items(), strict=False):
        panel(axis, name, part["providers"])
    for axis in list(axes.flat)[len(parts) :]:
        axis.set_axis_off()
    labels = {"gpu": "", "torch": "torch ", "triton": "triton ", "date": ""}
    line = ", ".join(f"{label}{machine.get(k, '?')}" for k, label in labels.items())
    figure.suptitle(f"LM head of a DPO step, milliseconds ({line})", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    found = json.loads((RESULTS / "head_gpu.json").read_text())
    draw(found["parts"], found["machine"], RESULTS / "head_gpu.png")


if __name__ == "__main__":
    main()
