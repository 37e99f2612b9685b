"""Progress of a training: a live bar on a terminal, one line a log elsewhere, on rank 0 only."""

import math
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dpo_fast.curves import eval_prefix, value_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# The trainer's key -> how it is called, and its format.
FIELDS = {
    "loss": ("loss", ".4f"),
    "rewards/margins": ("margin", "+.3f"),
    "rewards/accuracies": ("accuracy", ".3f"),
    "perf/pairs_per_sec": ("pairs/s", ".3g"),
    "learning_rate": ("lr", ".2e"),
}
_LIVE_FIELDS, _NARROW_FIELDS = tuple(FIELDS)[:4], tuple(FIELDS)[:3]
_EVAL_FIELDS = _NARROW_FIELDS
NARROW = 104  # columns of a terminal; below it, less is shown


class TrainingProgress(TrainerCallback):
    """Shows step, loss, margin, accuracy, pairs per second and the time to go.

    Args:
        console: where to show it; None: stdout. Live if it is a terminal.
        live: False prints plain lines on a terminal, too.
    """

    def __init__(self, console: "Console | None" = None, *, live: bool = True) -> None:
        self._console, self._want_live = console, live
        self._bar: Progress | None = None
        self._stop: Any = None
        self._tasks: dict[str, Any] = {}
        self._first_step, self._begin = 0, time.monotonic()

    # -- events ------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar; a resumed run starts where it stood."""
        self._first_step, self._begin = state.global_step, time.monotonic()
        if not state.is_world_process_zero:
            return
        if self._is_live():
            self._open()
            assert self._bar is not None
            self._tasks["train"] = self._bar.add_task(
                "train", total=state.max_steps, completed=state.global_step, shown=""
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._tasks["train"], completed=state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """A second bar while an evaluation runs."""
        if not state.is_world_process_zero or not self._is_live():
            return
        if self._bar is None:  # evaluate() outside of a training
            self._open()
        assert self._bar is not None
        if "eval" not in self._tasks:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self._tasks["eval"] = self._bar.add_task("eval", total=total, shown="")
        self._bar.advance(self._tasks["eval"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """New numbers: beside the bar, or as a line. Evaluations and the summary are lines
        always.
        """
        if not state.is_world_process_zero or not logs:
            return
        is_train = "loss" in logs and "train_runtime" not in logs
        if self._bar is not None and is_train:
            keys = _NARROW_FIELDS if self._is_narrow() else _LIVE_FIELDS
            shown = "  ".join(format_fields(logs, keys))
            self._bar.update(self._tasks["train"], shown=shown)
            return
        line = describe_log(logs, state.global_step, state.max_steps)
        if is_train and not self._is_live():
            line += f" | {self._to_go(state)}"
        if line:
            self._print(line)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The evaluation's bar goes; its numbers came as a line."""
        self._close_eval()

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any,
        **kwargs: Any,
    ) -> None:
        """As after an evaluation."""
        self._close_eval()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    # -- the display -------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the terminal back; also after an error, and at exit of the process."""
        if self._stop is not None:
            self._stop()
        self._bar, self._stop, self._tasks = None, None, {}

    def _close_eval(self) -> None:
        if self._bar is None or "eval" not in self._tasks:
            return
        self._bar.remove_task(self._tasks.pop("eval"))
        self._bar.refresh()
        if not self._tasks:
            self.close()

    def _out(self) -> "Console":
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        return self._console

    def _is_live(self) -> bool:
        console = self._out() if self._want_live else None
        return console is not None and console.is_terminal and not console.is_dumb_terminal

    def _is_narrow(self) -> bool:
        return self._out().width < NARROW

    def _open(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        times = [TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn()]
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", style="cyan"),
            *(times[2:] if self._is_narrow() else times),
            console=self._out(),
            expand=True,
        )
        self._bar.start()
        # a run that ends in an error must not leave the terminal without a cursor
        self._stop = weakref.finalize(self, self._bar.stop)

    def _print(self, line: str) -> None:
        if self._is_live():
            self._out().print(line, markup=False, highlight=False)
        else:
            print(line, file=self._console.file if self._console else sys.stdout, flush=True)

    def _to_go(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if done <= 0:
            return "? left"
        left = (time.monotonic() - self._begin) / done * (state.max_steps - state.global_step)
        return f"{clock(left)} left"


def use_progress(trainer: Any) -> TrainingProgress | None:
    """Replace transformers' progress of ``trainer`` by :class:`TrainingProgress`.

    ``disable_tqdm=True`` gives plain lines. A notebook keeps its own widget (None is returned).
    """
    plain = any(type(c) is PrinterCallback for c in trainer.callback_handler.callbacks)
    if trainer.pop_callback(PrinterCallback if plain else ProgressCallback) is None:
        return None
    progress = TrainingProgress(live=not plain)
    trainer.add_callback(progress)
    return progress


def describe_log(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """One line for one log of the trainer, or nothing if it says nothing that is shown."""
    parts = [f"step {step}/{max_steps}"]
    if logs.get("epoch") is not None:
        parts.append(f"epoch {logs['epoch']:.2f}")
    if "train_runtime" in logs:
        parts.append(f"done in {clock(logs['train_runtime'])}")
        if "train_loss" in logs:
            parts.append(f"mean loss {logs['train_loss']:.4f}")
        return " | ".join(parts)
    prefix = eval_prefix(logs)
    if prefix is not None:
        return " | ".join([*parts, prefix.rstrip("_"), *format_fields(logs, _EVAL_FIELDS)])
    fields = format_fields(logs, tuple(FIELDS))
    return " | ".join([*parts, *fields]) if fields else ""


def format_fields(logs: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """``["loss 0.6931", ...]`` for the keys that are there."""
    values = {key: value_of(logs, key) for key in keys}
    return [
        f"{FIELDS[key][0]} {value:{FIELDS[key][1]}}"
        for key, value in values.items()
        if value is not None
    ]


def clock(seconds: float) -> str:
    """``"1:02:03"`` or ``"2:03"``."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
