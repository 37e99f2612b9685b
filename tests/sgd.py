"""Short trainings in other people's trainers: SGD, so that parameters move by their gradients."""

import tempfile
from typing import Any

import torch

STEPS = 3


def sgd_arguments(**own: Any) -> dict[str, Any]:
    """Three steps without clipping, each logged, in fp32 on the CPU; ``own`` on top."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **own,
    }


def flat(model: Any) -> torch.Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def run(trainer: Any) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """What a training logged, and how far it moved the parameters."""
    before = flat(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return log, flat(trainer.model) - before
