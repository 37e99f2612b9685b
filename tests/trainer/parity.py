"""Runs the same training in TRL 1.16's DPOTrainer and in dpo_fast.Trainer and compares what came
out.

Both get deep copies of one model, a perturbed reference, ragged rows, some of them truncated, in
fp32.
"""

import copy
import gc
import random
import tempfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from tests.tiny import tiny_model, tiny_preferences, tiny_tokenizer

# Rewards, logps and friends of both trainers; the keys that transformers adds are compared apart.
METRICS = (
    "loss",
    "grad_norm",
    "entropy",
    "num_tokens",
    "mean_token_accuracy",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
)


@dataclass
class Run:
    """What a training left behind: the parameters before and after, the log, the trainer."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    log: list[dict[str, float]]
    trainer: Any

    def update(self) -> Tensor:
        """All trained parameters' change as one vector, float64."""
        return torch.cat(
            [(self.after[n].double() - self.before[n].double()).flatten() for n in self.after]
        )


def perturbed(model: nn.Module, scale: float = 0.02, seed: int = 7) -> nn.Module:
    """A copy of ``model`` with noise on every weight."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(scale * torch.randn(param.shape, generator=generator))
    return model


def config_kwargs(**overrides: Any) -> dict[str, Any]:
    """Arguments that both DPOConfigs take; 24 tokens truncate about a third of the rows."""
    base = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 5,
        "learning_rate": 1e-3,
        # at 1e-8 AdamW turns the rounding of gradients that are 0 in truth into whole updates
        "adam_epsilon": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_length": 24,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "beta": 0.2,
        "disable_tqdm": True,
        "seed": 3,
    }
    return {**base, **overrides}


def rows(n: int = 24, seed: int = 0) -> Dataset:
    """Ragged preference rows of few words, some longer than ``max_length``.

    Short answers keep sums of log-probs near -100, where float32 resolves 1e-5: with longer ones
    the comparison would measure rounding, of TRL's sums as much as of ours.
    """
    rng = random.Random(seed)
    out = []
    for row in tiny_preferences(n, seed):
        cut = {
            "prompt": rng.randint(1, 5),
            "chosen": rng.randint(1, 6),
            "rejected": rng.randint(1, 6),
        }
        out.append({key: " " + " ".join(row[key].split()[:words]) for key, words in cut.items()})
    return Dataset.from_list(out)


def train(
    trainer_class: type,
    config_class: type,
    model: nn.Module,
    *,
    ref_model: nn.Module | None = None,
    config: dict[str, Any],
    dataset: Dataset | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
) -> Run:
    """Train a deep copy of ``model`` and return the run."""
    trainer = trainer_class(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(ref_model),
        args=config_class(**{**config, "output_dir": tempfile.mkdtemp()}),
        train_dataset=rows() if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
        **(trainer_kwargs or {}),
    )
    before = trained_parameters(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(before, trained_parameters(trainer.model), log, trainer)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that require gradients, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@cache
def freeze_imported() -> None:
    """Every training collects garbage; a walk through all imported modules is half of its time."""
    gc.collect()
    gc.freeze()


def both(model: nn.Module, **kwargs: Any) -> tuple[Run, Run]:
    """(ours, TRL's) on the same arguments."""
    import trl

    import dpo_fast

    own = kwargs.pop("own_config", {})
    config = kwargs.pop("config")
    ours = train(dpo_fast.Trainer, dpo_fast.DPOConfig, model, config={**config, **own}, **kwargs)
    theirs = train(trl.DPOTrainer, trl.DPOConfig, model, config=config, **kwargs)
    freeze_imported()
    return ours, theirs


def relative_update_error(ours: Run, theirs: Run) -> float:
    """``|| update - update_trl || / || update_trl ||`` over all trained parameters."""
    assert ours.after.keys() == theirs.after.keys()
    reference = theirs.update()
    assert reference.norm() > 0, "TRL's run changed nothing: the comparison would be empty"
    return float((ours.update() - reference).norm() / reference.norm())


def assert_same_log(
    ours: Run, theirs: Run, tolerance: float = 1e-5, skip: tuple[str, ...] = ()
) -> None:
    """Every metric of every log line within ``tolerance``, relative (absolute below 1)."""
    assert len(ours.log) == len(theirs.log) > 0
    for step, (mine, expected) in enumerate(zip(ours.log, theirs.log, strict=True)):
        for key in METRICS:
            if key in skip:
                continue
            assert key in mine and key in expected, (step, key, sorted(mine), sorted(expected))
            # the norm of the gradient after steps of AdamW is no function of theirs that rounding
            # leaves alone
            bound = max(1.0, abs(expected[key])) * tolerance * (10 if key == "grad_norm" else 1)
            assert abs(mine[key] - expected[key]) <= bound, (step, key, mine[key], expected[key])


def policy_and_reference() -> tuple[nn.Module, nn.Module]:
    """A tiny Llama and a perturbed copy of it."""
    policy = tiny_model("llama")
    return policy, perturbed(policy)
