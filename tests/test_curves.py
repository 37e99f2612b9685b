"""metrics.jsonl holds every log, also of a killed run; curves.png shows what was logged."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_fast.curves import (
    SMOOTH_FROM,
    CurvesCallback,
    series_of,
    smoothed,
    write_curves,
    write_metrics,
)

HISTORY: list[dict[str, Any]] = [
    {"loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.5, "step": 1},
    {"loss": 0.5, "rewards/margins": 0.4, "rewards/accuracies": 0.75, "step": 2},
    {
        "eval_aux_loss": 9.0,
        "eval_loss": 0.6,
        "eval_rewards/margins": 0.2,
        "eval_rewards/accuracies": 0.6,
        "eval_runtime": 1.0,
        "step": 2,
    },
    {"eval_hard_loss": 0.65, "eval_rewards/margins": 0.1, "eval_hard_runtime": 1.0, "step": 2},
    {"train_runtime": 3.0, "train_loss": 0.6, "step": 2},
]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_the_logs(tmp_path: Path) -> None:
    assert write_metrics(tmp_path / "new", HISTORY) == tmp_path / "new" / "metrics.jsonl"
    assert read(tmp_path / "new") == HISTORY


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"loss": math.nan, "grad_norm": math.inf, "step": 1}])
    assert read(tmp_path) == [{"loss": None, "grad_norm": None, "step": 1}]


def test_series() -> None:
    losses = series_of([*HISTORY, {"loss": math.nan, "step": 3}], "loss")
    assert [tuple(s) for s in losses] == [
        ("train", [1.0, 2.0], [0.69, 0.5]),  # neither train_loss nor the NaN
        ("eval", [2.0], [0.6]),
        ("eval_hard", [2.0], [0.65]),
    ]
    assert [s.name for s in series_of(HISTORY, "rewards/accuracies")] == ["train", "eval"]
    margins = {s.name: s.values for s in series_of(HISTORY, "rewards/margins")}
    assert margins == {"train": [0.0, 0.4], "eval": [0.2], "eval_hard": [0.1]}


def drawn(monkeypatch: pytest.MonkeyPatch, folder: Path, history: list[dict[str, Any]]) -> Any:
    """The figure that ``write_curves`` saves."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    path = write_curves(folder, history, title="a run")
    assert path == folder / "curves.png" and path.read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_curves_show_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, tmp_path, HISTORY)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss", "reward margin", "accuracy"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines["train"].get_ydata()) == [0.69, 0.5]
    assert list(lines["eval_hard"].get_ydata()) == [0.65]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["train", "eval", "eval_hard"]


def test_many_points_are_smoothed_over_the_raw_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [{"loss": float(i % 2), "step": i} for i in range(4 * SMOOTH_FROM)]
    raw, smooth = drawn(monkeypatch, tmp_path, history).axes[0].get_lines()
    assert list(raw.get_ydata()) == [log["loss"] for log in history]
    assert max(abs(y - 0.5) for y in smooth.get_ydata()[-10:]) < 0.1


def test_a_run_shorter_than_logging_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one log, of the end, has no loss: words instead of an empty scale, and a whole step."""
    history = [{"train_loss": 0.69, "rewards/margins": 0.1, "rewards/accuracies": 0.5, "step": 4}]
    loss, margin, _ = drawn(monkeypatch, tmp_path, history).axes
    assert "logging_steps" in loss.texts[0].get_text()
    assert not loss.get_xticks().size and not loss.get_yticks().size
    assert margin.get_xlim() == (3.0, 5.0) and not margin.texts


@pytest.mark.parametrize("size", [1, 5, 40, 1000])
def test_smoothing_keeps_a_constant(size: int) -> None:
    assert smoothed([3.0] * size) == pytest.approx([3.0] * size)


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert write_curves(tmp_path, []) is None
    assert write_curves(tmp_path, [{"train_runtime": 1.0, "step": 0}]) is None
    assert not (tmp_path / "curves.png").exists()


def test_no_global_state(tmp_path: Path) -> None:
    import matplotlib

    settings, modules = dict(matplotlib.rcParams), set(sys.modules)
    write_curves(tmp_path, HISTORY)
    assert dict(matplotlib.rcParams) == settings
    assert "matplotlib.pyplot" not in set(sys.modules) - modules


def state(history: list[dict[str, Any]], main: bool = True) -> Any:
    return SimpleNamespace(is_world_process_zero=main, log_history=history)


def test_callback_writes_as_it_goes(tmp_path: Path) -> None:
    args: Any = SimpleNamespace(output_dir=str(tmp_path / "run"))
    callback, history = CurvesCallback(), HISTORY[:1]
    callback.on_train_begin(args, state(history), None)  # type: ignore[arg-type]
    assert read(tmp_path / "run") == HISTORY[:1]  # what a checkpoint brought
    history = HISTORY[:2]
    callback.on_log(args, state(history), None)  # type: ignore[arg-type]
    assert read(tmp_path / "run") == HISTORY[:2]  # before the end: a kill keeps it
    assert not (tmp_path / "run" / "curves.png").exists()
    callback.on_train_end(args, state(HISTORY), None)  # type: ignore[arg-type]
    assert read(tmp_path / "run") == HISTORY and (tmp_path / "run" / "curves.png").is_file()


def test_a_torn_line_goes_at_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 0.69, "step": 1}\n{"loss": 0.')
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    CurvesCallback().on_train_begin(args, state(HISTORY[:1]), None)  # type: ignore[arg-type]
    assert read(tmp_path) == HISTORY[:1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    callback = CurvesCallback()
    for event in (callback.on_train_begin, callback.on_log, callback.on_train_end):
        event(args, state(HISTORY, main=False), None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
