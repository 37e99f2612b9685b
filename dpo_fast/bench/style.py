"""Colours and axes of the benchmarks' pictures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
COLORS = {
    "dpo_fast": "#2563eb",
    "dpo_fast per token": "#38bdf8",
    "dpo_fast min-memory": "#1e3a8a",
    "dpo_fast packed": "#0ea5e9",
    "dpo_fast shared_prefix": "#1e3a8a",
    "dpo_fast padded rows": "#38bdf8",
    "dpo_fast, found in the cache": "#14b8a6",
    "dpo_fast nearest": "#38bdf8",
    "dpo_fast shadow": "#1e3a8a",
    "naive": "#dc2626",
    "TRL 0.24 style": "#a16207",
    "TRL": "#ea580c",
    "TRL's loop": "#ea580c",
    "Liger": "#9333ea",
    "cut-cross-entropy": "#0891b2",
    "torch.compile": "#64748b",
    "torch._foreach_lerp_": "#0d9488",
    "STREAM triad": "#94a3b8",
    "STREAM triad, streaming stores": "#64748b",
}
OTHERS = ("#059669", "#be123c", "#4f46e5", "#a16207", "#0d9488", "#7c3aed", "#475569", "#b45309")
OURS = ("#2563eb", "#0ea5e9", "#1e3a8a", "#14b8a6", "#6366f1")


def color_of(variant: str) -> str:
    """The same for a variant in every picture; forms of ours are blues."""
    if variant in COLORS:
        return COLORS[variant]
    palette = OURS if variant.startswith("dpo_fast") else OTHERS
    return palette[sum(map(ord, variant)) % len(palette)]


def dress(axes: "Axes", title: str, below: str = "") -> None:
    """Title at the left (a small line under it), light grid, no box."""
    lines = below.count("\n") + 1 if below else 0
    axes.set_title(
        title, loc="left", color=INK, fontsize=11.5, fontweight="bold", pad=8 + 11 * lines
    )
    if below:
        axes.annotate(
            below, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points",
            color=FAINT, fontsize=8, va="bottom", ha="left",
        )  # fmt: skip
    axes.grid(color=GRID, linewidth=0.8, which="major")
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, which="both", labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def engineering(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, and enough of them to read a value from."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() != "log":
        return
    base = axis.get_transform().base
    low, high = sorted(axis.get_view_interval())
    narrow = high / max(low, 1e-12) < 2000
    if base == 10:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if narrow else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())


def ticks(axis: Any, values: list[float]) -> None:
    """Labels at the values that were measured, fewer where they would touch."""
    from matplotlib.ticker import FixedLocator, NullLocator

    kept: list[float] = []
    for value in values:
        if not kept or value / kept[-1] > (values[-1] / values[0]) ** 0.12:
            kept.append(value)
    axis.set_major_locator(FixedLocator(kept))
    axis.set_minor_locator(NullLocator())
    engineering(axis)


def plain(value: float) -> str:
    """12800 as "12.8k"."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e3:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


def spread_labels(axes: "Axes", points: Mapping[str, tuple[float, float]]) -> None:
    """A name at the right of each point, or at its left, moved up or down until it touches no name
    and no other point; with a white border, as lines of spread may run below it.
    """
    from matplotlib.patheffects import withStroke

    height, gap = 12.0, 9.0  # points of the page: what one line needs, and from the dot to a name
    figure: Any = axes.figure
    scale = 72.0 / figure.dpi
    edge = axes.transAxes.transform((0.0, 0.0))[0] * scale
    at = {name: axes.transData.transform(point) * scale for name, point in points.items()}
    taken = [(x - 6, x + 6, y) for x, y in at.values()]

    def free(left: float, right: float, y: float) -> bool:
        touched = (abs(y - o) < height and left < b and a < right for a, b, o in taken)
        return left > edge and not any(touched)

    places = [(side, shift) for shift in range(-60, 61, 3) for side in (1, -1)]
    places.sort(key=lambda place: (abs(place[1]) > height, place[0] < 0, abs(place[1])))
    for name, (x, y) in sorted(at.items(), key=lambda item: item[1][1]):
        width = gap + 5 + 5.4 * len(name)
        for side, shift in [*places, (1, 0)]:
            left, right = (x + gap - 1, x + width) if side > 0 else (x - width, x - gap + 1)
            if free(left, right, y + shift):
                break
        taken.append((left, right, y + shift))
        axes.annotate(
            name, points[name], (side * gap, shift), textcoords="offset points", va="center",
            ha="left" if side > 0 else "right", color=INK, fontsize=9, zorder=5,
            path_effects=[withStroke(linewidth=3.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6}
            if abs(shift) > height
            else None,
        )  # fmt: skip
