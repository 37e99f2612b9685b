"""The trainer on a GPU as a user has it: every reference and layout against the CPU; no host sync
within a micro-batch.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import dpo_fast

pytest.importorskip("datasets", reason="datasets is not installed on this machine")

from tests.tiny import tiny_model
from tests.trainer.cells import STRATEGIES, strategy_arguments
from tests.trainer.parity import Run, config_kwargs, perturbed, relative_update_error, train

pytestmark = pytest.mark.gpu

LAYOUTS = ("padded", "packed", "shared_prefix")
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3}


def run(strategy: str, layout: str, cache: Path, **config: Any) -> Run:
    arguments, shared, own = strategy_arguments(strategy)
    options = {**SGD, **shared, **own, "batch_layout": layout, "ref_cache_dir": str(cache)}
    return train(
        dpo_fast.Trainer,
        dpo_fast.DPOConfig,
        tiny_model("llama"),
        config=config_kwargs(**{**options, **config}),
        **arguments,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_follows_the_cpu(strategy: str, layout: str, tmp_path: Path) -> None:
    """bfloat16 autocast, as is the default there: rounding, and nothing else, in between."""
    on_cpu = run(strategy, "padded", tmp_path / "cpu")
    on_gpu = run(strategy, layout, tmp_path / "gpu", use_cpu=False, bf16=True)
    assert on_gpu.trainer.model.device.type == "cuda" and on_gpu.trainer.layout.name == layout
    for name, after in on_gpu.after.items():
        on_gpu.after[name] = after.cpu()
        on_gpu.before[name] = on_gpu.before[name].cpu()
    for ours, theirs in zip(on_gpu.log, on_cpu.log, strict=True):
        for key in ("loss", "logps/chosen", "logps/rejected", "entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=0.02, abs=0.02), key
    assert relative_update_error(on_gpu, on_cpu) < 0.1


def test_an_offloaded_reference_gives_the_same_bits() -> None:
    """Its layers come from pinned memory on a stream of their own."""
    policy = tiny_model("llama", num_hidden_layers=5)
    # at rest: FlashAttention's backward sums dq in any order, and the policy would drift
    options = {**SGD, "learning_rate": 0.0, "use_cpu": False, "bf16": True}
    logs = [
        train(
            dpo_fast.Trainer,
            dpo_fast.DPOConfig,
            policy,
            ref_model=perturbed(policy),
            config=config_kwargs(**options, ref_offload=offload),
        ).log
        for offload in (False, True)
    ]
    for kept, streamed in zip(*logs, strict=True):
        for key in ("loss", "rewards/chosen", "rewards/rejected"):
            assert kept[key] == streamed[key], key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_host_sync_in_a_micro_batch(layout: str, tmp_path: Path) -> None:
    trained = run("frozen", layout, tmp_path, use_cpu=False, bf16=True, logging_steps=100).trainer
    batch = trained._prepare_inputs(trained.data_collator(list(trained.train_dataset)[:4]))
    counts = trained._get_num_items_in_batch([batch], trained.args.device)

    def step() -> None:
        loss = trained.compute_loss(trained.model, batch, num_items_in_batch=counts)
        loss.backward()

    with trained.layout_attention():
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
