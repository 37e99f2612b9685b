"""The demo in one picture: who knows the answer, how sure, how it was learned, what it took."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpo_fast.demo.settings import Thresholds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID, LATTICE = "#1f2937", "#9ca3af", "#e5e7eb", "#cbd5e1"
COLORS = {"frozen": "#2563eb", "adapter": "#ea580c", "precomputed": "#059669", "ema": "#9333ea"}


def draw(results: Mapping[str, Any], limits: Thresholds) -> bytes:
    """The PNG. No display is needed, and no state of matplotlib is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    (who, learned), (sure, cost) = figure.subplots(2, 2)
    _who(who, results, limits)
    _learned(learned, results)
    _sure(sure, results)
    _cost(cost, results)
    data, before = results["data"], results["before"]
    figure.suptitle(
        f"DPO with four references: {data['train']} pairs, {data['heldout']} held out, "
        f"{before['parameters'] / 1e6:.2f} M parameters",
        color=INK,
        fontsize=15,
        fontweight="bold",
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _who(axes: "Axes", results: Mapping[str, Any], limits: Thresholds) -> None:
    """Accuracy on the held-out pairs: rules that do not read, the model before, the models
    after.
    """
    short = {name: name.partition(" (")[0] for name in results["baselines"]}
    bars = [(short[name], value, LATTICE) for name, value in results["baselines"].items()]
    bars.append(("before DPO", results["before"]["accuracy"], FAINT))
    for name, result in results["strategies"].items():
        bars.append((f"DPO, {name}", result["accuracy"], COLORS[name]))
    for i, (_, value, color) in enumerate(bars):
        axes.barh(i, value, color=color, height=0.66)
        axes.text(value + 0.012, i, f"{value:.3f}", va="center", color=INK, fontsize=10)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=10.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(limits.after_above, color="#dc2626", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(0.5, -0.62, "chance", ha="center", va="bottom", color=INK, fontsize=9)
    axes.text(
        limits.after_above, -0.62, "claimed", ha="center", va="bottom", color="#dc2626", fontsize=9
    )
    _dress(axes, "Who picks the right answer? (held-out pairs)", pad=16)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("accuracy", color=INK)


def _learned(axes: "Axes", results: Mapping[str, Any]) -> None:
    """Accuracy of the rewards on the held-out pairs over the steps."""
    for name, result in results["strategies"].items():
        points = [
            (log["step"], log["eval_rewards/accuracies"])
            for log in result["history"]
            if "eval_rewards/accuracies" in log
        ]
        steps, values = zip(*sorted(dict(points).items()), strict=True)
        axes.plot(steps, values, color=COLORS[name], linewidth=2.2, marker="o", markersize=5)
        train = [(log["step"], log["loss"]) for log in result["history"] if "loss" in log]
        axes.plot(*zip(*train, strict=True), color=COLORS[name], linewidth=1.2, alpha=0.45)
    handles = [
        axes.plot([], [], color=INK, linewidth=2.2, marker="o", markersize=5)[0],
        axes.plot([], [], color=INK, linewidth=1.2, alpha=0.45)[0],
    ]
    axes.legend(
        handles, ["accuracy of rewards, held-out", "loss, train"], frameon=False, labelcolor=INK
    )
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("optimizer step", color=INK)
    _dress(axes, "How it was learned")


def _sure(axes: "Axes", results: Mapping[str, Any]) -> None:
    """Distribution of the margins on the held-out pairs before and after."""
    import numpy as np

    after = {name: np.array(result["margins"]) for name, result in results["strategies"].items()}
    before = np.array(results["before"]["margins"])
    every = np.concatenate([before, *after.values()])
    low, high = np.quantile(every, [0.002, 0.998])
    edges: Any = np.linspace(low - 1, high + 1, 60)
    axes.hist(before, edges, color=FAINT, alpha=0.55, label="before DPO")
    for name, margins in after.items():
        axes.hist(
            margins, edges, histtype="step", color=COLORS[name], linewidth=2, label=f"DPO, {name}"
        )
    axes.axvline(0.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("log p(chosen) - log p(rejected), nats", color=INK)
    axes.set_ylabel("held-out pairs", color=INK)
    axes.set_yscale("symlog", linthresh=10)
    axes.legend(frameon=False, labelcolor=INK)
    _dress(axes, "How sure it is")


def _cost(axes: "Axes", results: Mapping[str, Any]) -> None:
    """Seconds of each strategy, the reference's part of them apart."""
    for i, (name, result) in enumerate(results["strategies"].items()):
        before, during = (result["reference_seconds"][part] for part in ("before", "during"))
        policy = result["seconds"] - before - during
        axes.barh(i, policy, color=COLORS[name], height=0.6)
        axes.barh(i, during, left=policy, color=COLORS[name], alpha=0.45, height=0.6)
        axes.barh(
            i,
            before,
            left=policy + during,
            color="white",
            edgecolor=COLORS[name],
            hatch="////",
            height=0.6,
        )
        text = f"{result['seconds']:.1f} s, {result['peak_bytes'] / 1e6:.0f} MB"
        axes.text(result["seconds"], i, f"  {text}", va="center", color=INK, fontsize=10)
    names = list(results["strategies"])
    axes.set_yticks(range(len(names)), names, fontsize=10.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * max(result["seconds"] for result in results["strategies"].values()))
    from matplotlib.patches import Patch

    handles = [
        Patch(color=FAINT),
        Patch(color=FAINT, alpha=0.45),
        Patch(facecolor="white", edgecolor=FAINT, hatch="////"),
    ]
    names = ["policy", "reference, in the steps", "reference, before training"]
    axes.legend(
        handles,
        names,
        frameon=False,
        labelcolor=INK,
        loc="upper center",
        ncols=3,
        bbox_to_anchor=(0.45, -0.12),
    )
    axes.set_xlabel("seconds (and peak memory above the loaded program)", color=INK)
    _dress(axes, "What it took")
    axes.grid(False)
    axes.spines["left"].set_visible(False)


def _dress(axes: "Axes", title: str, pad: float = 8) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=12.5, fontweight="bold", pad=pad)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
