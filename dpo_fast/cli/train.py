"""`dpo-fast train`: preference pairs in, a trained model, its metrics and curves out."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.cli.logs import show_logs

if TYPE_CHECKING:
    from dpo_fast.trainer import Trainer

logger = logging.getLogger("dpo_fast")

DESCRIPTION = (
    "Train a causal LM on preference pairs. Options are the fields of DPOConfig (TRL's names) and "
    "those of model and data below; --config takes them from a YAML file, and flags win over it. "
    "--accelerate-config ddp|fsdp2|zero2|zero3 (or a YAML of accelerate) runs it on many devices; "
    "--num_processes says on how many."
)


def run(words: list[str]) -> int:
    """Train, save, draw; with ``--accelerate-config``, in processes that accelerate starts."""
    from dpo_fast.cli.launch import launch_command

    command = launch_command("train", words)
    if command is not None:
        sys.stdout.flush()
        os.execv(command[0], command)
    show_logs()
    from dpo_fast.cli.build import build_trainer
    from dpo_fast.cli.parser import parse
    from dpo_fast.curves import CurvesCallback
    from dpo_fast.progress import TrainingProgress, use_progress

    arguments = parse("dpo-fast train", DESCRIPTION, words)
    args = arguments.training
    resume = resume_from(args.resume_from_checkpoint)
    trainer = build_trainer(arguments)
    use_progress(trainer)
    if not any(isinstance(c, CurvesCallback) for c in trainer.callback_handler.callbacks):
        trainer.add_callback(CurvesCallback())
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (KeyboardInterrupt, FloatingPointError):
        draw_so_far(trainer)
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TrainingProgress):
                callback.close()
    save(trainer)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.data.dataset_name)
    if hasattr(trainer, "end"):  # transformers 5.18: finishes trackers and process group
        trainer.end()
    return 0


def draw_so_far(trainer: "Trainer") -> None:
    """The curves of a run that was stopped, or whose loss is no number any more."""
    from dpo_fast.curves import write_curves

    folder = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        write_curves(folder, trainer.state.log_history, title=f"{folder.name} (not finished)")


def save(trainer: "Trainer") -> None:
    """Model, tokenizer and model card into the output folder."""
    from dpo_fast.model_card import write_model_card

    folder = str(trainer.args.output_dir)
    trainer.save_model(folder)
    if trainer.is_world_process_zero():
        write_model_card(folder, trainer)
    logger.info("Model, metrics.jsonl and curves.png are in %s.", folder)


def resume_from(given: Any) -> str | bool | None:
    """``--resume_from_checkpoint``: true (the newest complete one), auto (that one if there
    is one), a folder, or nothing.
    """
    if given is None or given is False or str(given).lower() in ("false", "no", "none"):
        return None
    return True if str(given).lower() in ("true", "yes") else str(given)
