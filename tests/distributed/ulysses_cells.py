"""One rank of a launch: trainings whose rows DeepSpeed's sequence parallelism cuts.

Accelerate, transformers and DeepSpeed are the real ones, gloo's all-to-all among them; what a CPU
needs beside is :mod:`tests.distributed.deepspeed_on_cpu`.
"""

from typing import Any

from tests.distributed import cells
from tests.distributed.train_cells import reset, use
from tests.parallel.context_worker import make
from tests.trainer.parity import rows


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """``spec``: runs, ``[[engine, [name of a cell of tests.parallel.context_worker, ...]], ...]``."""
    from accelerate import ParallelismConfig

    found = {}
    for engine, names in spec["runs"]:
        for name in names:
            fresh_process()
            parallel = ParallelismConfig(sp_size=2, sp_backend="deepspeed")
            trainer = make(name, **use(engine), parallelism_config=parallel)
            assert (trainer.engine, trainer.layout.name) == (engine, "padded")
            assert (trainer.ranks_per_pair, trainer.ranks_per_eval_pair) == (2, 1)
            found[f"{engine}/{name}"] = trained(trainer, watch(trainer))
    return found


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
