"""A data set in one picture: how long its parts are, what a cut costs, what a layout computes."""

import io
from typing import TYPE_CHECKING

import numpy as np

from dpo_fast.inspection.pairs import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, WARN = "#1f2937", "#e5e7eb", "#dc2626"
COLORS = {"prompt": "#64748b", "chosen": "#059669", "rejected": "#ea580c"}
LAYOUT_COLOR = "#2563eb"
_BINS = 50


def draw(found: Inspection) -> bytes:
    """The PNG. No display is needed, and no state of matplotlib is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    parts, cut, layouts = figure.subplots(1, 3, width_ratios=(1.25, 1.1, 0.95))
    _parts(parts, found)
    _cut(cut, found)
    _layouts(layouts, found)
    figure.suptitle(
        f"{found.name}: {found.rows:,} pairs, {found.kept:,} to train on",
        color=INK,
        fontsize=14,
        fontweight="bold",
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _style(axes: "Axes", title: str) -> None:
    axes.set_title(title, color=INK, fontsize=11.5, loc="left")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9.5)


def _parts(axes: "Axes", found: Inspection) -> None:
    """Histograms of prompt, chosen and rejected over common bins."""
    values = {name: found.lengths[name] for name in COLORS}
    top = max(1, *(int(np.quantile(v, 0.995)) for v in values.values()))
    edges = np.unique(np.linspace(0, top + 1, min(_BINS, top + 1) + 1).astype(int)).tolist()
    for name, numbers in values.items():
        shown = np.minimum(numbers, top)  # the last bin holds what is longer
        median = int(np.median(numbers))
        axes.hist(shown, edges, color=COLORS[name], alpha=0.16)
        axes.hist(
            shown,
            edges,
            histtype="step",
            color=COLORS[name],
            linewidth=1.8,
            label=f"{name}, median {median:,}",
        )
    axes.set_xlabel("tokens (longest 0.5 % in the last bin)", color=INK, fontsize=10)
    axes.set_ylabel("pairs", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=9.5, labelcolor=INK)
    _style(axes, "Length of prompt and answers")


def _cut(axes: "Axes", found: Inspection) -> None:
    """How many pairs fit into a length, and where ``max_length`` stands."""
    longest = np.sort(found.lengths["longer sequence"])
    share = np.arange(1, len(longest) + 1) / len(longest)
    axes.plot(longest, 100 * share, color=LAYOUT_COLOR, linewidth=2, drawstyle="steps-post")
    axes.set_ylim(0, 104)
    right = longest[-1] * 1.05
    if found.max_length is not None:
        over = float((longest > found.max_length).mean())
        right = max(right, found.max_length * 1.12)
        axes.axvline(found.max_length, color=WARN, linewidth=1.3, linestyle=(0, (4, 3)))
        axes.text(
            found.max_length * 0.985,
            6,
            f"max_length {found.max_length:,}: {100 * over:.1f} % of the pairs are longer",
            color=WARN,
            fontsize=9.5,
            rotation=90,
            ha="right",
            va="bottom",
        )
    axes.set_xlim(0, right)
    axes.set_xlabel("tokens of the longer sequence", color=INK, fontsize=10)
    axes.set_ylabel("pairs that fit, %", color=INK, fontsize=10)
    _style(axes, "What a limit cuts")


def _layouts(axes: "Axes", found: Inspection) -> None:
    """Tokens that each layout computes, as a share of padded rows."""
    names = list(found.tokens)
    full = max(found.tokens["padded"], 1)
    for i, name in enumerate(names):
        share = 100 * found.tokens[name] / full
        axes.bar(i, share, color=LAYOUT_COLOR, alpha=1.0 - 0.25 * i, width=0.62)
        axes.text(i, share + 1.5, f"{share:.0f} %", ha="center", color=INK, fontsize=10)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_ylim(0, 112)
    axes.set_ylabel("tokens computed, % of padded", color=INK, fontsize=10)
    _style(axes, f"Layouts, {found.batch_size} pairs a padded batch")
