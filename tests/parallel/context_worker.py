"""Trainings on ranks that share each micro-batch's positions, through accelerate's ``cp_size``.

Everything is accelerate's, transformers' and torch's but two things that need a GPU: FSDP2 is what
:mod:`tests.distributed.fsdp_on_cpu` makes of it, and torch's ring attention is replaced by one that
gathers keys and values (:mod:`tests.parallel.sequence_worker`). The cells run under DeepSpeed's
``sp_size``, too (:mod:`tests.distributed.ulysses_cells`).
"""

import tempfile
from typing import Any

from tests.parallel.sequence_worker import POSITIONS, gathered_attention
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import strategy_arguments
from tests.trainer.parity import config_kwargs, rows

# name -> (strategy of the reference, options)
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen, sigmoid + sft": ("frozen", {"loss_type": ["sigmoid", "sft"]}),
    "frozen, ipo": ("frozen", {"loss_type": ["ipo"]}),
    "precomputed, accumulated": ("precomputed", {"gradient_accumulation_steps": 2}),
    "adapter": ("adapter", {}),
    "moving": ("ema", {}),
}


def make(name: str, **more: Any) -> Any:
    """The trainer of a cell; ``more``: of its config."""
    import dpo_fast

    strategy, options = CELLS[name]
    arguments, shared, own = strategy_arguments(strategy)
    sgd = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3}
    fields = {**shared, **own, "batch_layout": "padded", **sgd, **options, **more}
    config = config_kwargs(**fields)
    return dpo_fast.Trainer(
        tiny_model("llama"),
        arguments.get("ref_model"),
        dpo_fast.DPOConfig(**config, ref_cache_dir=tempfile.mkdtemp()),
        train_dataset=rows(),
        eval_dataset=rows(7, seed=1),
        processing_class=tiny_tokenizer(),
        **arguments.get("trainer_kwargs", {}),
    )


def trained(trainer: Any) -> dict[str, Any]:
    """Parameters before and after, the log, and an evaluation of other rows, a ragged last batch
    among them.
    """
    from tests.distributed.cells import log_of, whole

    before = whole(trainer.model)
    trainer.train()
    found = {"before": before, "after": whole(trainer.model), "log": log_of(trainer)}
    return {**found, "eval": trainer.evaluate()}


def context_cells(rank: int) -> dict[str, Any]:
    import accelerate
    from accelerate import ParallelismConfig
    from transformers import AttentionInterface

    from dpo_fast.reference.shards import reshard_all
    from tests.distributed.fsdp_on_cpu import assert_sharded, use_fsdp2

    use_fsdp2()
    found = {}
    for name in CELLS:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        options = {"parallelism_config": ParallelismConfig(cp_size=2), "ddp_backend": "gloo"}
        trainer = make(name, **options)
        # a rank's share of the rows, as the model sees it
        widths: list[int] = []
        compute = trainer.compute_loss

        def cut(model: Any, inputs: Any, *args: Any, compute: Any = compute, **kwargs: Any) -> Any:
            POSITIONS.append(inputs["position_ids"])
            widths.append(inputs["input_ids"].shape[1])  # noqa: B023  (used in this turn only)
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = cut
        original = AttentionInterface._global_mapping["sdpa"]
        AttentionInterface._global_mapping["sdpa"] = gathered_attention
        try:
            found[name] = {**trained(trainer), "widths": widths}
        finally:
            AttentionInterface._global_mapping["sdpa"] = original
        reshard_all(trainer.model)
        assert_sharded(trainer.model, 2)
        assert trainer.ranks_per_pair == 2 and trainer.layout.name == "padded"
    return found
