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
from dpo_fast.faults import reasons_shared
from dpo_fast.model_card import write_model_card
from dpo_fast.ranks import all_ranks

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
        over; ``"auto"`` does, too, and starts anew where there is none.

        Raises:
            ValueError: there is no complete checkpoint.
            CheckpointError: the given one is damaged, or was trained against another reference.
            RankError: another rank failed; with its reason.
        """
        with reasons_shared():
            path = self._agreed_checkpoint(resume_from_checkpoint)
            if path is not None:
                load_reference_state(path, self.reference)
                self._metrics.total_tokens = _tokens_so_far(path)  # type: ignore[attr-defined]
            self._perf.restart()  # type: ignore[attr-defined]
            return super().train(path, *args, **kwargs)  # type: ignore[misc]

    def _agreed_checkpoint(self, asked: str | os.PathLike[str] | bool | None) -> str | None:
        """The checkpoint to go on from: rank 0 finds and checks it, once for all."""
        ranks = all_ranks()
        found: tuple[str | None, ValueError | None] = (None, None)
        if ranks.rank == 0:
            try:
                found = self._complete_checkpoint(asked), None
            except ValueError as error:
                found = None, error
        path, refusal = ranks.broadcast(found)
        if refusal is not None:
            raise refusal
        return path

    def _complete_checkpoint(self, asked: str | os.PathLike[str] | bool | None) -> str | None:
        if asked is None or asked is False:
            return None
        if asked is not True and asked != "auto":
            verify_checkpoint(str(asked))
            return str(asked)
        path, skipped = newest_complete_checkpoint(self.args.output_dir)
        for one in skipped:
            logger.warning("Checkpoint passed over: %s.", one.reason)
        if path is None and asked == "auto":
            logger.info("No complete checkpoint in %r: starting anew.", self.args.output_dir)
            return None
        if path is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but {self.args.output_dir!r} holds no complete "
                "checkpoint: give a folder, start without it, or set 'auto' to go on where there "
                "is one."
            )
        logger.info("Resuming from %s.", path)
        return str(path)

    def _load_best_model(self) -> None:
        """At the end of training, where ``load_best_model_at_end`` asks for it; checked first."""
        best = self.state.best_model_checkpoint
        if best is not None:
            refusal: str | None = None
            if self.is_world_process_zero():  # type: ignore[attr-defined]
                try:
                    verify_checkpoint(best)
                except CheckpointError as error:
                    refusal = str(error)
            refusal = all_ranks().broadcast(refusal)
            if refusal is not None:
                raise CheckpointError(refusal)
        super()._load_best_model()  # type: ignore[misc]

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
            save_reference_state(
                stage.folder,
                self.reference,
                rank=self.accelerator.process_index,
                ranks=self.accelerator.num_processes,
            )
            if is_main:
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
