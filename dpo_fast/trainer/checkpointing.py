"""Checkpoints that are whole or not there, with the reference in them, and exact resume."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_fast.checkpoint import (
    CheckpointError,
    Stage,
    load_reference_state,
    newest_complete_checkpoint,
    save_reference_state,
    stage_checkpoint,
    verify_checkpoint,
)
from dpo_fast.model_card import write_model_card

logger = logging.getLogger("dpo_fast")


class CheckpointingMixin:
    """Part of :class:`dpo_fast.Trainer`: saves through a stage, resumes from what is complete."""

    args: Any
    accelerator: Any
    reference: Any
    state: Any
    _stage: Stage | None = None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; ``True`` takes the newest complete checkpoint and says what it passed
        over.

        Raises:
            ValueError: there is no complete checkpoint.
            CheckpointError: the given one is damaged, or was trained against another reference.
        """
        path = self._complete_checkpoint(resume_from_checkpoint)
        if path is not None:
            load_reference_state(path, self.reference)
            self._metrics.total_tokens = _tokens_so_far(path)  # type: ignore[attr-defined]
        self._perf.restart()  # type: ignore[attr-defined]
        return super().train(path, *args, **kwargs)  # type: ignore[misc]

    def _complete_checkpoint(self, asked: str | os.PathLike[str] | bool | None) -> str | None:
        if asked is None or asked is False:
            return None
        if asked is not True:
            verify_checkpoint(str(asked))
            return str(asked)
        path, skipped = newest_complete_checkpoint(self.args.output_dir)
        for one in skipped:
            logger.warning("Checkpoint passed over: %s.", one.reason)
        if path is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but {self.args.output_dir!r} holds no complete "
                "checkpoint: give a folder, "
                "or start without it."
            )
        logger.info("Resuming from %s.", path)
        return str(path)

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, its stage stands in for the run's folder."""
        if self._stage is not None:
            return str(self._stage.run_dir)
        return super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save aside, with reference and model card; hash, sync, rename; then rotate.

        Raises:
            FloatingPointError: a loss since the last log was not finite; nothing is written.
        """
        self.refuse_nonfinite_loss()  # type: ignore[attr-defined]
        run_dir = self._get_output_dir(trial)
        is_main = self.is_world_process_zero()  # type: ignore[attr-defined]
        with (
            self._perf.paused(),  # type: ignore[attr-defined]
            stage_checkpoint(
                run_dir,
                self.state.global_step,
                is_main=is_main,
                barrier=self.accelerator.wait_for_everyone,
            ) as stage,
        ):
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._stage = None
            self._name_best_checkpoint(stage, is_main)
            if is_main:
                save_reference_state(stage.folder, self.reference)
                write_model_card(stage.folder, self)
        if self.args.should_save:
            # not in transformers 4, where this module is imported all the same
            from transformers.trainer_utils import rotate_checkpoints

            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _name_best_checkpoint(self, stage: Stage, is_main: bool) -> None:
        """transformers recorded the best checkpoint under the stage's path, if it is this one."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).parent != stage.run_dir:
            return
        self.state.best_model_checkpoint = str(stage.final)
        if is_main:
            path = stage.folder / "trainer_state.json"
            written = json.loads(path.read_text())
            written["best_model_checkpoint"] = str(stage.final)
            path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _tokens_so_far(checkpoint: str) -> int:
    """``num_tokens`` of the checkpoint's last log line; 0 before the first."""
    history = TrainerState.load_from_json(
        os.path.join(checkpoint, "trainer_state.json")
    ).log_history
    return next((int(e["num_tokens"]) for e in reversed(history) if "num_tokens" in e), 0)


class ReferenceCallback(TrainerCallback):
    """Tells the reference that an optimizer step is done."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before anything is logged, evaluated or saved for this step."""
        self.reference.on_step_end(state.global_step)


__all__ = ["CheckpointError", "CheckpointingMixin", "ReferenceCallback"]
