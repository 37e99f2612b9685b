"""One rank of trainings whose logs and collectives are looked at."""

import json
from typing import Any

import torch

from tests.parallel.instrument import CountCollectives
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import config_kwargs, perturbed, rows, trained_parameters

# name -> (rows, pairs a micro-batch of a rank, accumulation, further settings)
RUNS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "batch size 1, accumulated": (24, 1, 3, {"logging_steps": 2, "max_steps": 4}),
    "uneven last batches": (10, 3, 2, {"logging_steps": 1, "num_train_epochs": 2}),
    "statistics in every step": (16, 2, 2, {"token_stats": "every", "max_steps": 4}),
}


def make(name: str, ranks: int, **overrides: Any) -> Any:
    import dpo_fast

    number, size, accumulation, settings = RUNS[name]
    config = config_kwargs(
        optim="sgd",
        learning_rate=0.05,
        batch_layout="padded",
        accelerator_config={"even_batches": False},
        gradient_accumulation_steps=accumulation,
    )
    if "num_train_epochs" in settings:
        del config["max_steps"]
    config |= {"loss_type": ["sigmoid", "sft"], **settings, **overrides}
    # micro-batch k of one process holds what micro-batches k of two ranks hold together
    config["per_device_train_batch_size"] = size * (2 // ranks)
    return dpo_fast.Trainer(
        tiny_model("llama"),
        perturbed(tiny_model("llama")),
        dpo_fast.DPOConfig(**config),
        train_dataset=rows(number),
        processing_class=tiny_tokenizer(),
    )


def trained(name: str, ranks: int) -> dict[str, Any]:
    """Parameters before and after, and the log."""
    trainer = make(name, ranks)
    before = trained_parameters(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "before": before,
        "after": trained_parameters(trainer.model),
        "log": json.loads(json.dumps(log)),
    }


def counted() -> list[tuple[str, dict[str, Any]]]:
    """All collectives of a training in order: those of counts, micro-batches and log steps, and
    what happened between them.
    """
    trainer = make("batch size 1, accumulated", 2)
    counter = CountCollectives()
    events: list[tuple[str, dict[str, Any]]] = []

    def watched(what: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            events.append(("between", counter.take()))
            found = call(*args, **kwargs)
            events.append((what, counter.take()))
            return found

        return run

    trainer.training_step = watched("micro-batch", trainer.training_step)
    trainer._get_num_items_in_batch = watched("counts", trainer._get_num_items_in_batch)
    trainer._maybe_log_save_evaluate = watched("log step?", trainer._maybe_log_save_evaluate)
    kinds: list[Any] = []
    compute = trainer.compute_loss

    def spy(*args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        kinds.append(type(num_items_in_batch.num_pairs))
        return compute(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.compute_loss = spy
    with counter:
        trainer.train()
    assert set(kinds) == {torch.Tensor}  # nobody asked the device for its value
    return events


def poisoned(rank: int, **overrides: Any) -> str:
    """The error of a run whose loss is NaN on rank 1 in step 3, and what it left on disk."""
    import os

    trainer = make("batch size 1, accumulated", 2, **overrides)
    compute = trainer.compute_loss

    def poison(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and trainer.state.global_step == 2:
            objective = trainer.objective
            trainer.objective = lambda *a, **k: _with_nan(objective(*a, **k))
            found = compute(model, inputs, *args, **kwargs)
            trainer.objective = objective
            return found
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = poison
    try:
        trainer.train()
    except FloatingPointError as error:
        folder = trainer.args.output_dir
        left = [name for name in os.listdir(folder) if name.startswith("checkpoint")]
        return f"{error} | {trainer.state.global_step} | {left}"
    return ""


def _with_nan(output: Any) -> Any:
    loss = output.fused.loss * torch.nan
    return output._replace(loss=output.loss * torch.nan, fused=output.fused._replace(loss=loss))


def metrics_cells(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(name, 2) for name in RUNS}
    found["counted"] = counted()
    found["at the log"] = poisoned(rank, logging_steps=4)
    found["before a checkpoint"] = poisoned(
        rank, logging_steps=100, save_strategy="steps", save_steps=4, max_steps=5
    )
    return found
