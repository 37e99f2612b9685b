"""One rank of a launch: trainings whose rows DeepSpeed's sequence parallelism cuts.

Accelerate, transformers and DeepSpeed are the real ones, and so is gloo's all-to-all; what a CPU
needs beside is in :mod:`tests.distributed.deepspeed_on_cpu`.
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.distributed import cells
from tests.distributed.deepspeed_on_cpu import gather_uneven
from tests.distributed.train_cells import reset, use
from tests.parallel.context_worker import make
from tests.trainer.parity import rows

# Clipped gradients would hide their scale.
UNCLIPPED = {"max_grad_norm": 1e6}
# Of the data's 24 pairs: three steps of two micro-batches of two for each of two groups of ranks,
FOUR = {**UNCLIPPED, "per_device_train_batch_size": 2}
# or an epoch of three steps of two micro-batches of four.
EPOCH = {**UNCLIPPED, "gradient_accumulation_steps": 2}


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """``spec``: ranks; runs: ``[[engine, sp_size, [name of a cell of
    tests.parallel.context_worker, ...]], ...]``; resumed: whether the run that stops after an epoch
    is wanted, too.
    """
    gather_uneven()
    found = {}
    for engine, size, names in spec["runs"]:
        groups = spec["ranks"] // size
        more = UNCLIPPED if groups == 1 else {**FOUR, "gradient_accumulation_steps": 2}
        for name in names:
            trainer = begin(engine, name, size, groups, **more)
            found[f"{engine}/{size}/{name}"] = trained(trainer, watch(trainer))
    if spec["resumed"]:
        found["resumed"] = resumed()
    return found


def begin(engine: str, name: str, size: int = 2, groups: int = 1, **more: Any) -> Any:
    """The trainer of a cell on groups of ``size`` ranks."""
    from accelerate import ParallelismConfig

    fresh_process()
    parallel = ParallelismConfig(
        sp_size=size, sp_backend="deepspeed", dp_replicate_size=1, dp_shard_size=groups
    )
    trainer = make(name, **use(engine), parallelism_config=parallel, **more)
    assert (trainer.engine, trainer.layout.name) == (engine, "padded")
    assert (trainer.ranks_per_pair, trainer.ranks_per_eval_pair) == (size, 1)
    return trainer


def trained(trainer: Any, watched: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parameters before and after, the log, an evaluation; what was ``watched`` in training."""
    before = cells.whole(trainer.model)
    trainer.train()
    out = cells.result(trainer, before) | {key: list(v) for key, v in (watched or {}).items()}
    exchanges = len((watched or {}).get("exchanges", []))
    out["eval"] = trainer.evaluate(rows(8, seed=1))
    assert len((watched or {}).get("exchanges", [])) == exchanges, "evaluation was cut"
    return out


def watch(trainer: Any) -> dict[str, Any]:
    """Widths of the batches that the loss gets, and shapes that went through DeepSpeed's
    all-to-all; both grow while it trains.
    """
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    widths: list[int] = []
    exchanges: list[tuple[int, ...]] = []
    compute, exchange = trainer.compute_loss, ulysses_sp._dim_zero_all_to_all

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.model.training:
            widths.append(inputs["input_ids"].shape[1])
        return compute(model, inputs, *args, **kwargs)

    def all_to_all(group: Any, tensor: Any) -> Any:
        exchanges.append(tuple(tensor.shape))
        return exchange(group, tensor)

    trainer.compute_loss = compute_loss
    ulysses_sp._dim_zero_all_to_all = all_to_all
    return {"widths": widths, "exchanges": exchanges}


def resumed() -> dict[str, Any]:
    """What a run of five steps left that went on from the end of its first epoch, and the error of
    one that was asked to go on from within it.
    """
    folder = shared_folder()
    saving = {**EPOCH, "save_strategy": "steps", "save_steps": 1, "output_dir": str(folder)}
    begin("zero2", "frozen, ipo", **saving).train()
    trainer = begin("zero2", "frozen, ipo", **saving | {"max_steps": 5})
    before = cells.whole(trainer.model)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    within = begin("zero2", "frozen, ipo", **saving | {"max_steps": 5})
    error = ""
    try:
        within.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    except ValueError as refusal:
        error = str(refusal)
    return {**cells.result(trainer, before), "error": error}


def shared_folder() -> Path:
    """A folder that all ranks know by the same name."""
    import torch.distributed as dist

    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    return Path(names[0])


def fresh_process() -> None:
    """DeepSpeed makes its groups once a process, and wraps transformers' attention for good: a
    launch that trains several times starts each as if it were the first.
    """
    from deepspeed.runtime.sequence_parallel import ulysses_sp
    from deepspeed.sequence.layer import _dim_zero_all_to_all
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    reset()
    ulysses_sp._dim_zero_all_to_all = _dim_zero_all_to_all
    groups._release_process_group_references()
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)
