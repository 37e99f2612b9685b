"""Progress: a bar on a terminal, a line a log elsewhere, nothing on other ranks."""

import gc
import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_callback import CallbackHandler

from dpo_fast.progress import TrainingProgress, clock, describe_log, use_progress

LOG = {
    "loss": 0.31794,
    "rewards/margins": 1.2612,
    "rewards/accuracies": 0.975,
    "learning_rate": 5e-7,
    "perf/pairs_per_sec": 86.94,
    "epoch": 0.5,
}
EVAL = {
    "eval_aux_loss": 9.0,
    "eval_loss": 0.5,
    "eval_rewards/margins": -0.25,
    "eval_rewards/accuracies": 0.625,
    "eval_runtime": 1.0,
}
SUMMARY = {"train_runtime": 65.4, "train_loss": 0.4, "epoch": 3.0}
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def new_state(step: int = 0, main: bool = True) -> Any:
    return SimpleNamespace(is_world_process_zero=main, global_step=step, max_steps=100)


def terminal(width: int = 140) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def played(progress: TrainingProgress, *logs: dict[str, Any], main: bool = True) -> None:
    """A training of 100 steps that logs at its steps 10, 20, ..."""
    state = new_state(main=main)
    none: Any = None
    progress.on_train_begin(none, state, none)
    for log in logs:
        state.global_step += 10
        progress.on_step_end(none, state, none)
        if "eval_loss" in log:
            for _ in range(2):
                progress.on_prediction_step(none, state, none, eval_dataloader=[1, 2])
        progress.on_log(none, state, none, logs=log)
        if "eval_loss" in log:
            progress.on_evaluate(none, state, none)
    progress.on_train_end(none, state, none)


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    played(TrainingProgress(), LOG, EVAL, SUMMARY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "step 10/100 | epoch 0.50 | loss 0.3179 | margin +1.261 | accuracy 0.975 | "
        "pairs/s 86.9 | lr 5.00e-07 | 0:00 left"
    )
    assert lines[1] == "step 20/100 | eval | loss 0.5000 | margin -0.250 | accuracy 0.625"
    assert lines[2] == "step 30/100 | epoch 3.00 | done in 1:05 | mean loss 0.4000"
    assert len(lines) == 3


def test_bar_on_a_terminal() -> None:
    console = terminal()
    played(TrainingProgress(console), LOG, EVAL)
    shown = text(console)
    assert "20/100" in shown and "loss 0.3179  margin +1.261  accuracy 0.975" in shown
    assert "pairs/s 86.9" in shown and "step 10/100" not in shown
    assert "step 20/100 | eval | loss 0.5000" in shown
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1


def test_narrow_terminal_cuts_no_number() -> None:
    console = terminal(width=80)
    played(TrainingProgress(console), LOG)
    last = text(console).replace("\r", "\n").split("\n")[-2]
    assert "10/100 loss 0.3179  margin +1.261  accuracy 0.975" in last
    assert "…" not in last and "pairs/s" not in last


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal()
    for progress in (TrainingProgress(console), TrainingProgress()):
        played(progress, LOG, EVAL, SUMMARY, main=False)
    assert text(console) == "" and capsys.readouterr().out == ""


def test_plain_lines_on_a_terminal_when_asked() -> None:
    console = terminal()
    played(TrainingProgress(console, live=False), LOG)
    assert text(console).startswith("step 10/100 | ") and HIDE_CURSOR not in text(console)


def test_evaluation_alone_closes_its_bar() -> None:
    console, none = terminal(), None
    progress: Any = TrainingProgress(console)
    state = new_state()
    progress.on_prediction_step(none, state, none, eval_dataloader=iter([1]))  # without a length
    progress.on_log(none, state, none, logs=EVAL)
    progress.on_evaluate(none, state, none)
    assert "eval | loss 0.5000" in text(console)
    assert text(console).count(SHOW_CURSOR) == 1


@pytest.mark.parametrize("how", ["close", "collected"])
def test_an_error_gives_the_terminal_back(how: str) -> None:
    console, none = terminal(), None
    progress: Any = TrainingProgress(console)
    progress.on_train_begin(none, new_state(), none)
    assert HIDE_CURSOR in text(console) and SHOW_CURSOR not in text(console)
    if how == "close":
        progress.close()
        progress.close()
    del progress
    gc.collect()
    assert text(console).count(SHOW_CURSOR) == 1


def test_resumed_run_starts_where_it_stood(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = TrainingProgress()
    state = new_state(step=90)
    progress.on_train_begin(None, state, None)
    progress._begin -= 10.0  # ten seconds later
    state.global_step = 95
    progress.on_log(None, state, None, logs=LOG)
    assert capsys.readouterr().out.strip().endswith("0:10 left")  # 2 s a step, 5 to go


def test_named_evaluation_and_empty_logs() -> None:
    logs = {"eval_hard_loss": 0.25, "eval_hard_runtime": 1.0, "eval_rewards/accuracies": 1.0}
    assert describe_log(logs, 1, 2) == "step 1/2 | eval_hard | loss 0.2500 | accuracy 1.000"
    assert describe_log({"something": 1.0}, 1, 2) == ""


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (float("inf"), "?"), (-1, "0:00")],
)
def test_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected


@pytest.mark.parametrize("theirs", [ProgressCallback, PrinterCallback])
def test_replaces_transformers_own(theirs: Any) -> None:
    handler = CallbackHandler([theirs()], None, None, None, None)
    trainer = SimpleNamespace(
        callback_handler=handler,
        pop_callback=handler.pop_callback,
        add_callback=handler.add_callback,
    )
    progress = use_progress(trainer)
    assert handler.callbacks == [progress]
    assert use_progress(trainer) is None and handler.callbacks == [progress]
    console = terminal()
    assert progress is not None
    progress._console = console
    played(progress, LOG)
    assert (HIDE_CURSOR in text(console)) is (theirs is ProgressCallback)
