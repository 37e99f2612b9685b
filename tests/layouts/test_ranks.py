"""Two ranks under DDP: a token budget with ranks that have fewer micro-batches than others."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer.parity import Run, relative_update_error

CONFIG = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_steps": 3,
    "batch_layout": "shared_prefix",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "logging_steps": 1,
}


def train_here(out: str, ranks: int, budget: int | None) -> None:
    """One process of the run; rank 0 leaves its parameters, its log and its batches in ``out``."""
    import dpo_fast
    from tests.tiny import tiny_model, tiny_tokenizer
    from tests.trainer.parity import config_kwargs, perturbed, rows, trained_parameters

    config = config_kwargs(**CONFIG, max_tokens_per_batch=budget, ddp_backend="gloo")
    config["per_device_train_batch_size"] = 4 // ranks
    trainer = dpo_fast.Trainer(
        tiny_model("llama"),
        perturbed(tiny_model("llama")),
        dpo_fast.DPOConfig(**config),
        train_dataset=rows(40),
        processing_class=tiny_tokenizer(),
    )
    forwards: list[tuple[int, int]] = []
    compute = trainer.compute_loss

    def spy(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        forwards.append((len(inputs["pair_index"]), inputs["num_tokens"]))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    before = trained_parameters(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    state = {
        "before": before,
        "after": trained_parameters(trainer.model),
        "log": json.dumps(log),
        "forwards": forwards,
    }
    torch.save(state, f"{out}.{trainer.args.process_index}")


def launch(tmp_path: Path, ranks: int, budget: int | None) -> tuple[Run, list[Any]]:
    out = str(tmp_path / f"run{ranks}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        f"from tests.layouts.test_ranks import train_here; train_here({out!r}, {ranks}, {budget})"
    )
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=env))
    assert [process.wait(timeout=300) for process in processes] == [0] * ranks
    states = [torch.load(f"{out}.{rank}") for rank in range(ranks)]
    run = Run(states[0]["before"], states[0]["after"], json.loads(states[0]["log"]), None)
    return run, [state["forwards"] for state in states]


def test_two_ranks_with_a_budget_take_the_steps_of_one(tmp_path: Path) -> None:
    """The same pairs in every step, whoever has them, with gradients that are summed exactly."""
    one, _ = launch(tmp_path, 1, None)
    two, forwards = launch(tmp_path, 2, 40)
    assert relative_update_error(two, one) < 1e-5
    for a, b in zip(two.log, one.log, strict=True):
        for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens"):
            assert abs(a[key] - b[key]) <= 1e-5 * max(1.0, abs(b[key])), key
    pairs = [sum(pairs for pairs, _ in rank) for rank in forwards]
    tokens = [sum(tokens for _, tokens in rank) for rank in forwards]
    assert pairs == [18, 18] and max(tokens) / min(tokens) < 1.1
    assert len(forwards[0]) == len(forwards[1])
    assert any(n == 0 for rank in forwards for n, _ in rank)  # a rank had nothing left to do


def test_segments_pass_the_hooks_of_fsdp2(tmp_path: Path) -> None:
    """Hooks that cast and move a layer's arguments hand the segments on untouched."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from tests.layouts.compare import AWKWARD, collators, global_error, run_step
    from tests.tiny import tiny_model

    batch = collators()["shared_prefix"](AWKWARD)
    plain = run_step(tiny_model("llama").train(), batch)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("llama").train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=True)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        sharded = run_step(model, batch)
        grads = {name: grad.full_tensor() for name, grad in sharded.grads.items()}
    finally:
        dist.destroy_process_group()
    assert global_error(grads, plain.grads) < 1e-6
