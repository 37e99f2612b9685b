"""One rank of a launch: TRL's trainer and FastDPOTrainer on the same pairs, one after the other."""

import os
import tempfile
from typing import Any

import torch

from tests.distributed.cells import PAIRS, log_of
from tests.distributed.train_cells import reset
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import lora_config
from tests.trainer.parity import config_kwargs, perturbed, rows, trained_parameters

# What both trainers are told, and the layouts that ours is tried in. TRL precomputes nothing on two
# ranks: each looks for the cache of a data set in memory in a temporary folder of its own.
PRECOMPUTED = {"precompute_ref_log_probs": True}
CELLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "frozen": ({}, ["padded", "shared_prefix"]),
    "adapter": ({"loss_type": ["ipo"]}, ["packed"]),
    "precomputed": (PRECOMPUTED, ["shared_prefix"]),
    "moving": (
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
        ["packed"],
    ),
}


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """``spec``: ranks, and cells: of :data:`CELLS`. By ``cell/layout`` or ``cell/trl``."""
    results = {}
    for name in spec["cells"]:
        shared, layouts = CELLS[name]
        for layout in ("trl", *layouts):
            reset()
            results[f"{name}/{layout}"] = train(name, layout, shared, spec["ranks"])
    return results


def train(name: str, layout: str, shared: dict[str, Any], ranks: int) -> dict[str, Any]:
    """One training: parameters before and after, and the log."""
    import trl

    import dpo_fast

    config = {
        **shared,
        "per_device_train_batch_size": PAIRS // ranks,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        "learning_rate": 1e-2,
    }
    if layout == "trl":
        config = {key: value for key, value in config.items() if key not in PRECOMPUTED}
        cls, args = trl.DPOTrainer, trl.DPOConfig(**config_kwargs(**config))
    else:
        own = {"batch_layout": layout, "ref_cache_dir": tempfile.mkdtemp()}
        cls = dpo_fast.integrations.FastDPOTrainer
        args = dpo_fast.DPOConfig(**config_kwargs(**config, **own))
    model = tiny_model("llama")
    torch.manual_seed(0)  # the adapter's first weights
    trainer = cls(
        model,
        None if name == "adapter" else perturbed(model),
        args,
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora_config() if name == "adapter" else None,
    )
    assert isinstance(trainer, trl.DPOTrainer)
    assert trainer.accelerator.num_processes == ranks
    before = trained_parameters(trainer.model)
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    assert (wrapped == "DistributedDataParallel") == (ranks > 1), wrapped
    return {"before": before, "after": trained_parameters(trainer.model), "log": log_of(trainer)}
