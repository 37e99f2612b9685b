"""What a training leaves behind for the eye: ``metrics.jsonl`` and ``curves.png``."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_fast.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("dpo_fast")

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"

Log = Mapping[str, Any]

# Key of the trainer's log, title of the panel, and the value of a model that has learned nothing.
PANELS = (
    ("loss", "loss", None),
    ("rewards/margins", "reward margin", 0.0),
    ("rewards/accuracies", "accuracy", 0.5),
)
TRAIN_COLOR = "#2563eb"
EVAL_COLORS = ("#ea580c", "#059669", "#9333ea", "#be123c", "#0891b2")
INK, FAINT = "#1f2937", "#9ca3af"
SMOOTH_FROM = 40  # points; fewer are drawn as they are


class Series(NamedTuple):
    """One curve."""

    name: str
    steps: list[float]
    values: list[float]


def write_metrics(folder: str | Path, log_history: Iterable[Log]) -> Path:
    """Write ``metrics.jsonl``: one JSON object for each log, train and eval, as the trainer logged
    it. Numbers that JSON lacks (NaN, infinities) become null.

    Returns:
        The file's path. It is replaced as a whole or not at all.
    """
    path = Path(folder) / METRICS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(map(_json_line, log_history)).encode())
    return path


def _json_line(log: Log) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in log.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def write_curves(folder: str | Path, log_history: Sequence[Log], title: str = "") -> Path | None:
    """Draw loss, reward margin and accuracy over the steps, train and eval, into ``curves.png``.

    No state of matplotlib is touched, and no display is needed.

    Returns:
        The file's path; None if the logs hold nothing to draw.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(series_of(log_history, key), name, level) for key, name, level in PANELS]
    if not any(curves for curves, _, _ in panels):
        return None
    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    for axes, (curves, name, level) in zip(figure.subplots(1, 3), panels, strict=True):
        _draw(axes, curves, name, level)
    handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    named = {str(k): line for k, line in handles.items() if not str(k).startswith("_")}
    if named:
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=len(named),
            frameon=False,
            labelcolor=INK,
        )
    if title:
        figure.suptitle(title, color=INK, fontsize=13, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    path = Path(folder) / CURVES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, image.getvalue())
    return path


def series_of(log_history: Iterable[Log], key: str) -> list[Series]:
    """The train curve of ``key`` and one for each evaluation set; non-finite points are left
    out.
    """
    found: dict[str, Series] = {}
    for log in log_history:
        prefix, value, step = eval_prefix(log), value_of(log, key), log.get("step")
        if value is None or step is None or not math.isfinite(value):
            continue
        owner = "train" if prefix is None else prefix.rstrip("_")
        series = found.setdefault(owner, Series(owner, [], []))
        series.steps.append(float(step))
        series.values.append(float(value))
    return sorted(found.values(), key=lambda series: (series.name != "train", series.name))


def eval_prefix(log: Log) -> str | None:
    """``"eval_"``, ``"eval_<set>_"`` or another prefix if the log is of an evaluation, else None.

    Told by the runtime, which transformers logs under the set's own prefix.
    """
    for name in log:
        if name.endswith("_runtime") and name != "train_runtime":
            return name.removesuffix("runtime")
    return None


def value_of(log: Log, key: str) -> float | None:
    """The number called ``key``, of the training or of the log's evaluation; None without one.

    The pair metrics of every evaluation set are called ``eval_...``, as in TRL.
    """
    prefix = eval_prefix(log)
    value = log.get(key) if prefix is None else log.get(prefix + key, log.get(f"eval_{key}"))
    return value if isinstance(value, int | float) else None


def _draw(axes: "Axes", curves: Sequence[Series], name: str, level: float | None) -> None:
    axes.set_title(name, loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_xlabel("optimizer step", color=INK)
    axes.locator_params(axis="x", integer=True)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    if level is not None:
        axes.axhline(level, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), label="_level")
    others = 0
    for curve in curves:
        if curve.name == "train":
            _draw_train(axes, curve)
            continue
        color = EVAL_COLORS[others % len(EVAL_COLORS)]
        others += 1
        axes.plot(
            curve.steps,
            curve.values,
            color=color,
            linewidth=1.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label=curve.name,
        )
    if name == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    _range_of_steps(axes, curves)


def _range_of_steps(axes: "Axes", curves: Sequence[Series]) -> None:
    """Whole steps around a single one; words where nothing was logged, as in runs that are shorter
    than ``logging_steps``.
    """
    steps = {step for curve in curves for step in curve.steps}
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, max(steps) + 1)
    if not steps:
        axes.set_xticks([])
        axes.set_yticks([])
        words = "no finite value was logged (see logging_steps)"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, color=FAINT, ha="center", va="center")


def _draw_train(axes: "Axes", curve: Series) -> None:
    smooth = len(curve.values) >= SMOOTH_FROM
    if smooth:
        axes.plot(curve.steps, curve.values, color=TRAIN_COLOR, alpha=0.25, linewidth=1.0)
    axes.plot(
        curve.steps,
        smoothed(curve.values) if smooth else curve.values,
        color=TRAIN_COLOR,
        linewidth=2.2,
        marker="o" if len(curve.values) == 1 else None,
        label="train (smoothed)" if smooth else "train",
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the points, without the bias of its
    start.
    """
    decay = 1.0 - 1.0 / max(len(values) / 20.0, 1.0)
    total = weight = 0.0
    out = []
    for value in values:
        total = decay * total + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        out.append(total / weight)
    return out


class CurvesCallback(TrainerCallback):
    """Keeps ``metrics.jsonl`` in the output folder up to date from the first log on, and draws
    ``curves.png`` at the end; rank 0 only.

    A killed run has its metrics, too; a resumed one takes up those of its checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what a checkpoint brought along."""
        if state.is_world_process_zero:
            write_metrics(str(args.output_dir), state.log_history)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the newest log (transformers stores it before it calls back)."""
        path = Path(str(args.output_dir)) / METRICS_FILE
        if state.is_world_process_zero and state.log_history and path.parent.is_dir():
            with open(path, "a", encoding="utf-8") as file:
                file.write(_json_line(state.log_history[-1]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Both files, complete."""
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        write_metrics(folder, state.log_history)
        write_curves(folder, state.log_history, title=folder.name)
