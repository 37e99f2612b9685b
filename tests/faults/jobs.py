"""What the processes do that are killed: functions of plain arguments, run by the nursery."""

import errno
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (imported once, by the nursery's server)
import peft  # noqa: F401
import torch
from transformers import TrainerCallback

import dpo_fast
from dpo_fast.reference.shards import reshard_all
from dpo_fast.trainer import Trainer
from tests.distributed.fsdp_on_cpu import assert_sharded, use_fsdp2
from tests.faults.events import Events, watch_everything
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import strategy_arguments
from tests.trainer.parity import config_kwargs, rows

STEPS = 7


def trainer_of(strategy: str, folder: Path, **overrides: Any) -> Trainer:
    """Seven steps over an epoch's end, a checkpoint every second step, two of them kept."""
    callbacks = overrides.pop("callbacks", None)
    arguments, shared, own = strategy_arguments(strategy)
    config = config_kwargs(
        **shared,
        **own,
        output_dir=str(folder / "run"),
        ref_cache_dir=str(folder / "refs"),
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        max_steps=STEPS,
        lr_scheduler_type="linear",
    )
    return dpo_fast.Trainer(
        tiny_model("llama"),
        arguments.get("ref_model"),
        dpo_fast.DPOConfig(**{**config, **overrides}),
        train_dataset=rows(),
        eval_dataset=rows(4) if "eval_strategy" in overrides else None,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **arguments.get("trainer_kwargs", {}),
    )


def small_parts() -> None:
    """Several parts a cache: one every four rows."""
    from dpo_fast.reference import build
    from dpo_fast.reference.precompute import Precompute

    def precompute(*args: Any, **kwargs: Any) -> Precompute:
        return Precompute(*args, **kwargs, part_rows=4)

    build.Precompute = precompute  # type: ignore[assignment,misc]


def train(strategy: str, folder: str, fatal: int | None, overrides: dict[str, Any]) -> None:
    """Go on where there is something to go on from; die at moment ``fatal``."""
    torch.set_num_threads(1)
    logging.getLogger("dpo_fast").setLevel(logging.INFO)
    started = time.monotonic()
    events = Events(fatal)
    small_parts()
    watch_everything(events)
    trainer_of(strategy, Path(folder), **overrides).train(resume_from_checkpoint="auto")
    facts = {"seconds": time.monotonic() - started, "moments": events.names}
    (Path(folder) / "facts.json").write_text(json.dumps(facts))


class Trouble(TrainerCallback):
    """What happens to one rank when a step is done."""

    def __init__(self, what: str, rank: int, step: int) -> None:
        self.what, self.rank, self.step = what, rank, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.step or args.process_index != self.rank:
            return
        if self.what == "raise":
            raise ValueError("the reader of this rank found no more disks")
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "nan":
            with torch.no_grad():
                next(kwargs["model"].parameters()).fill_(float("nan"))


def train_rank(strategy: str, folder: str, trouble: list[Any], overrides: dict[str, Any]) -> None:
    """One rank of a launch; ``trouble``: what, which rank, after which step; or nothing.

    ``overrides``: of the config; with ``fsdp2`` under FSDP2, else under DDP.
    """
    torch.set_num_threads(1)
    overrides = dict(overrides)
    if sharded := overrides.pop("fsdp2", False):
        use_fsdp2()
    callbacks: list[TrainerCallback] = [Trouble(*trouble)] if trouble else []
    if trouble and trouble[0] == "disk full":
        callbacks = []
        _no_room(rank=trouble[1], step=trouble[2])
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", **overrides}
    trainer = trainer_of(strategy, Path(folder), callbacks=callbacks, **options)
    assert trainer.engine == ("fsdp2" if sharded else "ddp")
    trainer.train(resume_from_checkpoint="auto")
    if sharded:
        reshard_all(trainer.model)
        assert_sharded(trainer.model, trainer.accelerator.num_processes)


def _no_room(rank: int, step: int) -> None:
    """The manifest of checkpoint ``step`` finds the disk full (only the main rank writes it)."""
    from dpo_fast import checkpoint

    original = checkpoint.write_manifest

    def full(folder: Any) -> None:
        if Path(folder).name == f"checkpoint-{step}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder)

    if int(os.environ["RANK"]) == rank:
        checkpoint.write_manifest = full
