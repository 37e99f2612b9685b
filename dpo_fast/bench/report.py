"""A result as Markdown: a table for each case, fitted exponents, and what was left out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_fast.bench.fit import exponents

Result = Mapping[str, Any]


def markdown(result: Result) -> str:
    """The whole report."""
    quick = "Quick run: it shows that everything works, not how fast it is."
    parts = [
        f"# {result['suite']}: {result['about']}",
        quick if result["quick"] else "",
        _machine(result),
        _peers(result),
        *(_case(name, case) for name, case in result["cases"].items()),
        _exponents(result),
        _reading(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(result: Result) -> str:
    return "Machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items())


def _peers(result: Result) -> str:
    return "Peers: " + ", ".join(f"{name} {version}" for name, version in result["peers"].items())


def _case(name: str, case: Mapping[str, Any]) -> str:
    axes = ", ".join(f"{axis} {number(value)}" for axis, value in case["axes"].items())
    notes = "; ".join(f"{key} {_plain(value)}" for key, value in case["notes"].items())
    top = case["ceilings"]
    ceiling = (
        f"ceilings in this run: GEMM {top['gemm_flops'] / 1e9:.0f} GFLOP/s ({top['dtype']}), "
        + (f"FMA from registers {top['fma_flops'] / 1e9:.0f} GFLOP/s, " if top["fma_flops"] else "")
        + f"copy {top['copy_bytes'] / 1e9:.1f} GB/s"
    )
    floor = case.get("floor_seconds")
    if floor:
        ceiling += f"; limit {milliseconds(floor)} ms"
    lines = [f"## {name}", axes + (f" ({notes})" if notes else ""), ceiling, _table(case)]
    return "\n\n".join(line for line in lines if line)


def _table(case: Mapping[str, Any]) -> str:
    rows, floor = case["rows"], case.get("floor_seconds")
    kinds = list(dict.fromkeys(k for row in rows.values() for k in row.get("errors", {})))
    timed = [row for row in rows.values() if "seconds" in row]
    has_work = any("work" in row for row in timed)
    head = ["", "ms", "quartiles", "time / dpo_fast"]
    head += ["GB/s"] if has_work else []
    head += ["limit / time"] if floor else []
    head += ["peak MiB", *(f"error: {kind}" for kind in kinds)]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        cells = [name, *_numbers(row, has_work, floor), *_errors(row, kinds)]
        lines.append(cells)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    why = [
        f"- {name}: {row.get('left_out') or row['refused']}"
        for name, row in rows.items()
        if "seconds" not in row
    ]
    return table + ("\n\nWithout a number:\n" + "\n".join(why) if why else "")


def _numbers(row: Mapping[str, Any], has_work: bool, floor: float | None) -> list[str]:
    if "seconds" not in row:
        word = "refused" if "refused" in row else "left out"
        return [word, "", "", *([""] if has_work else []), *([""] if floor else []), ""]
    low, high = row["quartiles"]
    cells = [milliseconds(row["seconds"]), f"{milliseconds(low)} .. {milliseconds(high)}"]
    cells.append(f"{row['over_ours']:.2f}" if "over_ours" in row else "")
    if has_work:
        cells.append(f"{row['work'] / row['seconds'] / 1e9:.1f}" if "work" in row else "")
    if floor:
        cells.append(f"{floor / row['seconds']:.2f}")
    peak = row.get("peak_mib")
    return [*cells, "" if peak is None else number(peak)]


def _errors(row: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    errors = row.get("errors", {})
    return [f"{errors[kind]:.1e}" if kind in errors else "" for kind in kinds]


def _exponents(result: Result) -> str:
    found = exponents(result["cases"])
    if not found:
        return ""
    variants = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    head = ["", *found]
    lines = [head, ["---"] * len(head)]
    for name in variants:
        values = [by_name.get(name) for by_name in found.values()]
        lines.append([name, *("" if v is None else f"{v:.2f}" for v in values)])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return (
        "## How the time grows\n\nseconds = a * size ^ exponent, least squares in logarithms\n\n"
        + table
    )


def _reading() -> str:
    return (
        "Variants take turns in one process; times are medians over the rounds. "
        "`time / dpo_fast` is the median of the ratios within a round. `limit` is what the "
        "ceilings allow for the arithmetic and the bytes that no implementation can do without. "
        "Peak memory is what a step needs beyond what was held before, its results included. "
        "Errors are against float64 on the same inputs; a variant beyond its limit is refused and "
        "gets no speed."
    )


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return number(seconds * 1e3)


def number(value: float) -> str:
    """Three significant digits (whole numbers in full), no exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    rounded = round(value, digits)
    return f"{rounded:.0f}" if rounded == round(rounded) else f"{rounded:.{digits}f}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str(value)
