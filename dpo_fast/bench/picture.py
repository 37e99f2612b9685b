"""A result as a picture: time against memory and accuracy, and the curves with the limit."""

import io
import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpo_fast.bench.fit import Points, axes_of, curve, exponent
from dpo_fast.bench.report import number
from dpo_fast.bench.style import INK, color_of, dress, engineering, spread_labels, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
Places = dict[str, tuple[float, float]]

LABELS = {
    "N": "N, scored tokens",
    "V": "V, vocabulary",
    "H": "H, hidden size",
    "prompt share": "prompt's share of the real tokens",
    "pairs": "pairs of the batch",
}
LINEAR = ("prompt share",)
COLUMNS = 3
DASHES = (0, (4, 3))
SMALLEST = 1e-9  # an error of 0 on a logarithmic axis
UNITS = {"logps": ", nats a sequence", "loss": ", relative", "gradient": ", relative"}


def draw(result: Result) -> bytes:
    """The PNG. No display is needed, and no state of matplotlib is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = result["cases"]
    axes = axes_of(cases)
    clouds = main_cases(result)
    exact = most_telling(result, clouds)
    panels = len(clouds) + (exact is not None) + len(axes)
    columns = 2 if panels == 4 else min(COLUMNS, max(1, panels))
    rows = max(1, math.ceil(panels / columns))
    size = (5.4 * columns + 0.6, 4.5 * rows + 1.1)
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr, call-arg]
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    named: list[tuple[Any, Places]] = []
    for panel, name in zip(grid, clouds, strict=False):
        if uses_memory(cases[name]):
            named.append((panel, cloud(panel, name, cases[name])))
        else:
            bars(panel, name, cases[name])
    rest = grid[len(clouds) :]
    if exact is not None:
        panel = rest.pop(0)
        named.append((panel, accuracy(panel, exact, cases[exact])))
    for panel, axis in zip(rest, axes, strict=False):
        growth(panel, axis, cases)
    for panel in grid[panels:]:
        panel.set_visible(False)
    _title(figure, result)
    _legend(figure, result, per_line=2 * columns)
    figure.draw_without_rendering()  # panels get their size: names keep apart at that size
    figure.set_layout_engine("none")
    for panel, places in named:
        spread_labels(panel, places)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def main_cases(result: Result) -> list[str]:
    """Cases drawn as time against memory: those on no curve or on all of several; or the last."""
    cases, axes = result["cases"], set(axes_of(result["cases"]))
    found = []
    for name, case in cases.items():
        on = set(case["curves"]) & axes
        if not on or (on == axes and len(axes) > 1):
            found.append(name)
    return found or list(cases)[-1:]


def cloud(axes: "Axes", name: str, case: Mapping[str, Any]) -> Places:
    """Time against peak memory, both logarithmic: down and left is better. Returns the points."""
    rows = {n: r for n, r in case["rows"].items() if "seconds" in r}
    points = {n: (r["seconds"] * 1e3, max(r.get("peak_mib") or 1.0, 1.0)) for n, r in rows.items()}
    for variant, (x, y) in points.items():
        low, high = (q * 1e3 for q in rows[variant]["quartiles"])
        color = color_of(variant)
        axes.plot([low, high], [y, y], color=color, linewidth=1.6, alpha=0.6)
        axes.plot([x], [y], marker="o", markersize=9, color=color, markeredgecolor="white")
    dress(axes, name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    limit = case.get("floor_seconds")
    if limit:
        axes.axvline(limit * 1e3, color=INK, linewidth=1.1, linestyle=DASHES)
    _room(axes, points, limit)
    engineering(axes.xaxis)
    engineering(axes.yaxis)
    axes.set_xlabel("ms a step (down and left is better)", color=INK)
    axes.set_ylabel("peak memory of a step, MiB", color=INK)
    return points


def uses_memory(case: Mapping[str, Any]) -> bool:
    """Whether some variant needs memory of its own, so that there is something to compare."""
    return any((row.get("peak_mib") or 0.0) > 1.0 for row in case["rows"].values())


def bars(axes: "Axes", name: str, case: Mapping[str, Any]) -> None:
    """Times of variants that need no memory, with their bandwidth."""
    rows = {n: r for n, r in case["rows"].items() if "seconds" in r}
    for i, (variant, row) in enumerate(rows.items()):
        value = row["seconds"] * 1e3
        axes.barh(i, value, color=color_of(variant), height=0.62)
        rate = f", {row['work'] / row['seconds'] / 1e9:.1f} GB/s" if "work" in row else ""
        text = axes.annotate(
            f"{number(value)} ms{rate}", (value, i), (6, 0), textcoords="offset points",
            va="center", color=INK, fontsize=9, zorder=5,
        )  # fmt: skip
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    dress(axes, name)
    axes.set_yticks(range(len(rows)), [textwrap.fill(n, 22, break_long_words=False) for n in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.45e3 * max((r["seconds"] for r in rows.values()), default=1.0))
    limit = case.get("floor_seconds")
    if limit:
        axes.axvline(limit * 1e3, color="white", linewidth=2.4)
        axes.axvline(limit * 1e3, color=INK, linewidth=1.2, linestyle=DASHES)
    axes.set_xlabel("ms", color=INK)


def _room(axes: "Axes", points: Mapping[str, tuple[float, float]], limit: float | None) -> None:
    """Limits with space for the names at the right and above."""
    if not points:
        return
    xs = [x for x, _ in points.values()] + ([limit * 1e3] if limit else [])
    ys = [y for _, y in points.values()]
    span = max(max(xs) / min(xs), 2.0)
    axes.set_xlim(min(xs) / span**0.08, max(xs) * span**0.45)
    high = max(max(ys) / min(ys), 2.0)
    axes.set_ylim(min(ys) / high**0.2, max(ys) * high**0.25)


def growth(axes: "Axes", axis: str, cases: Mapping[str, Any]) -> None:
    """Time over one size, with the limit and the fitted exponents."""
    found = {n: points for n, points in curve(cases, axis).items() if len(points) > 1}
    for variant, points in found.items():
        xs, ys = zip(*((x, y * 1e3) for x, y in points), strict=True)
        if variant == "limit":
            axes.plot(xs, ys, color=INK, linewidth=1.2, linestyle=DASHES)
        else:
            axes.plot(xs, ys, color=color_of(variant), linewidth=2, marker="o", markersize=4.5)
    below = ""
    axes.set_yscale("log")
    if axis not in LINEAR:
        axes.set_xscale("log", base=2)
        ticks(axes.xaxis, sorted({x for points in found.values() for x, _ in points}))
        below = _exponents(found)
    dress(axes, f"growing {LABELS.get(axis, axis)}", below)
    engineering(axes.yaxis)
    axes.set_xlabel(LABELS.get(axis, axis), color=INK)
    axes.set_ylabel("ms a step", color=INK)


def _exponents(found: Mapping[str, Points]) -> str:
    steep = [
        f"{variant} {slope:.2f}".replace(" ", "\N{NO-BREAK SPACE}")
        for variant, points in found.items()
        if (slope := exponent(points)) is not None
    ]
    return "\n".join(textwrap.wrap("exponents: " + ", ".join(steep), 78)) if steep else ""


def accuracy(axes: "Axes", name: str, case: Mapping[str, Any]) -> Places:
    """Time against the first error, both logarithmic. Returns the points."""
    rows = {n: r for n, r in case["rows"].items() if "seconds" in r}
    kind = next(iter(next(iter(rows.values()))["errors"]))
    points = {
        n: (r["seconds"] * 1e3, max(r["errors"][kind], SMALLEST))
        for n, r in rows.items()
        if kind in r["errors"]
    }
    for variant, (x, y) in points.items():
        axes.plot([x], [y], marker="o", markersize=9, color=color_of(variant), mec="white")
    dress(axes, f"how exact: {name}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _room(axes, points, None)
    engineering(axes.xaxis)
    axes.set_xlabel("ms a step (down and left is better)", color=INK)
    axes.set_ylabel(f"error of {kind} against float64{UNITS.get(kind, '')}", color=INK)
    return points


def most_telling(result: Result, names: list[str]) -> str | None:
    """The main case whose variants differ most in their first error, if they do by ten times."""
    spread = {}
    for name in names:
        rows = [r for r in result["cases"][name]["rows"].values() if "seconds" in r]
        errors = [next(iter(r["errors"].values())) for r in rows if r["errors"]]
        positive = [max(e, SMALLEST) for e in errors]
        spread[name] = max(positive) / min(positive) if positive else 0.0
    best = max(spread, key=lambda name: spread[name], default=None)
    return best if best is not None and spread[best] > 10 else None


def _title(figure: Any, result: Result) -> None:
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['threads']} threads of {machine['cpu']}"
    facts = f"{where}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}"
    quick = ", quick run" if result["quick"] else ""
    width = int(figure.get_figwidth() * 72 / 7.2)  # a letter of this size takes 7.2 points
    lines = textwrap.wrap(f"{result['suite']}: {result['about']}", width)
    lines += textwrap.wrap(f"{facts}{quick}", width)
    figure.suptitle("\n".join(lines), color=INK, fontsize=12.5)


def _legend(figure: Any, result: Result, per_line: int) -> None:
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    names = list(
        dict.fromkeys(
            name
            for case in result["cases"].values()
            for name, row in case["rows"].items()
            if "seconds" in row
        )
    )
    handles: list[Any] = [
        Line2D([], [], color=color_of(n), marker="o", linewidth=2, label=n) for n in names
    ]
    handles.append(Line2D([], [], color=INK, linestyle=DASHES, label="limit (measured rates)"))
    ncols = min(per_line, len(handles))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols, frameon=False, labelcolor=INK
    )
