"""Trains in a process of its own and is killed by SIGKILL after a given step: ``python -m
tests.trainer.killed_run``.
"""

import json
import os
import signal
import sys
from typing import Any

from transformers import TrainerCallback


class KillAfter(TrainerCallback):
    """SIGKILL this process when ``step`` is done, before anything is saved for it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def build(
    strategy: str,
    folder: str,
    callbacks: list[TrainerCallback] | None = None,
    ref_model: Any = None,
) -> Any:
    """A trainer of seven steps (crossing an epoch) that saves every second one; equal calls, equal
    trainers.
    """
    import dpo_fast
    from tests.tiny import tiny_model, tiny_tokenizer
    from tests.trainer.cells import strategy_arguments
    from tests.trainer.parity import config_kwargs, rows

    arguments, shared, own = strategy_arguments(strategy)
    config = config_kwargs(
        **shared,
        **own,
        output_dir=os.path.join(folder, "run"),
        ref_cache_dir=os.path.join(folder, "refs"),
        save_strategy="steps",
        save_steps=2,
        max_steps=7,
        lr_scheduler_type="linear",
    )
    return dpo_fast.Trainer(
        tiny_model("llama"),
        ref_model or arguments.get("ref_model"),
        dpo_fast.DPOConfig(**config),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **arguments.get("trainer_kwargs", {}),
    )


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    build(spec["strategy"], spec["folder"], [KillAfter(spec["step"])]).train()
