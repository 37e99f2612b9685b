"""DeepSpeed's checkpoints read by another number of ranks than wrote them.

DeepSpeed cuts optimizer states by rank. Its universal form (arXiv:2406.18820) holds them whole, one
folder a parameter, and any number of ranks reads it. It is made beside the run's checkpoints, read
and removed; the checkpoint itself stays as it was written.
"""

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dpo_fast.checkpoint import CONVERTED, CheckpointError
from dpo_fast.ranks import all_ranks
from dpo_fast.reference.shards import reshard_all

logger = logging.getLogger("dpo_fast")

_UNIVERSAL = "_universal"


@contextlib.contextmanager
def readable_checkpoint(checkpoint: str, accelerator: Any, output_dir: str) -> Iterator[str]:
    """The folder to resume from: ``checkpoint``, or a converted one where another number of ranks
    wrote it.

    Args:
        output_dir: where the converted one lies while it is needed; it takes up to twice 12 bytes a
            trained parameter until it has been read.

    Raises:
        CheckpointError: DeepSpeed could not convert it.
    """
    plugin = accelerator.state.deepspeed_plugin
    saved = saved_ranks(checkpoint)
    chosen = plugin.deepspeed_config.get("checkpoint", {}).get("load_universal", False)
    if chosen or not saved or saved == accelerator.num_processes:
        yield checkpoint
        return
    folder = Path(output_dir) / f"{CONVERTED}{Path(checkpoint).name}"
    ranks = all_ranks()
    refusal: str | None = None
    try:
        if ranks.rank == 0:
            logger.info(
                "%s was written by %d ranks of DeepSpeed and is read by %d: converted in %s.",
                *(checkpoint, saved, accelerator.num_processes, folder),
            )
            try:
                convert(Path(checkpoint), folder)
            except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
                refusal = f"{type(error).__name__}: {error}"
        refusal = ranks.broadcast(refusal)
        if refusal is not None:
            raise CheckpointError(
                f"{checkpoint} was written by {saved} ranks of DeepSpeed, this run has "
                f"{accelerator.num_processes}, and DeepSpeed could not convert it ({refusal}): "
                f"resume on {saved} ranks, or make room in {output_dir!r} if that is what it says; "
                "or start from its weights (zero_to_fp32.py in its folder) as a new run."
            )
        _read_universal(plugin, True)
        yield str(folder)
    finally:
        _read_universal(plugin, False)
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def convert(checkpoint: Path, folder: Path) -> None:
    """Make ``folder``: links to what ``checkpoint`` holds, and DeepSpeed's states in their
    universal form. DeepSpeed unpickles: only of a checkpoint whose manifest matches.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for entry in checkpoint.iterdir():
        (folder / entry.name).symlink_to(entry.resolve())
    tag = _tag(checkpoint)
    options = argparse.Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(folder / f"{tag}{_UNIVERSAL}"),
        # one process: forks of a process that holds a device and a process group are not safe
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what tensor parallelism would need to know: nothing here
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        ds_to_universal.main(options)


def after_reading(engine: Any, checkpoint: str) -> None:
    """When DeepSpeed's ``engine`` has read ``checkpoint``: if it was a converted one, later reads
    (the best model) are ordinary again, weights gathered before are dropped, and the space is free.
    """
    folder = Path(checkpoint)
    if not folder.name.startswith(CONVERTED):
        return
    engine._config.load_universal_checkpoint = False
    universal = folder / f"{_tag(folder)}{_UNIVERSAL}"
    mend_optimizer(engine.optimizer.optimizer, universal / "zero" / "optimizer_state.pt")
    reshard_all(engine.module)  # the universal form was read into the shards alone
    all_ranks().barrier()
    if all_ranks().rank == 0:
        shutil.rmtree(universal)


def mend_optimizer(optimizer: torch.optim.Optimizer, saved: Path) -> None:
    """What DeepSpeed 0.19 leaves wrong in torch's optimizer after reading the universal form under
    ZeRO-3: one step counter, a tensor, is shared by all groups of weights and counted up by each;
    and all groups have the first one's hyperparameters, its weight decay among them.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    groups = torch.load(saved, map_location="cpu", weights_only=False)["param_groups"]
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})


def saved_ranks(checkpoint: str) -> int:
    """How many ranks wrote ``checkpoint``; 0 where DeepSpeed left no optimizer states."""
    folder = Path(checkpoint)
    if not (folder / "latest").is_file():
        return 0
    return len(list((folder / _tag(folder)).glob("*_optim_states.pt")))


def _tag(checkpoint: Path) -> str:
    return (checkpoint / "latest").read_text().strip()


def _read_universal(plugin: Any, yes: bool) -> None:
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
        section = config.setdefault("checkpoint", {})
        section.pop("load_universal", None)
        if yes:
            section["load_universal"] = True
        elif not section:
            del config["checkpoint"]
