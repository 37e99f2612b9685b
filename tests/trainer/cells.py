"""The cells of the parity table: every loss of TRL 1.16 times every reference strategy."""

from typing import Any

from tests.tiny import tiny_model
from tests.trainer.parity import (
    Run,
    assert_same_log,
    both,
    config_kwargs,
    perturbed,
    relative_update_error,
)

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.05},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
STRATEGIES = ("frozen", "adapter", "precomputed", "ema")


def lora_config(**overrides: Any) -> Any:
    """LoRA whose adapter is not the identity at the start, so that policy and reference differ."""
    from peft import LoraConfig

    fields = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**fields, **overrides})


def strategy_arguments(strategy: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(arguments of both trainers, of both configs, of our config alone)."""
    model = tiny_model("llama")
    reference = perturbed(model)
    if strategy == "adapter":
        return {"trainer_kwargs": {"peft_config": lora_config()}}, {}, {"reference": "adapter"}
    if strategy == "precomputed":
        config = {"precompute_ref_log_probs": True}
        return {"ref_model": reference}, config, {"reference": "precomputed"}
    if strategy == "ema":
        config = {
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
            "ref_model_mixup_alpha": 0.6,
        }
        return {"ref_model": reference}, config, {"reference": "ema"}
    return {"ref_model": reference}, {}, {"reference": "frozen"}


def run_cell(strategy: str, config: dict[str, Any], tmp_path: Any) -> tuple[Run, Run]:
    """Both trainings of one cell."""
    arguments, shared, own = strategy_arguments(strategy)
    return both(
        tiny_model("llama"),
        config=config_kwargs(**{**shared, **config}),
        own_config={**own, "ref_cache_dir": str(tmp_path / "refs")},
        **arguments,
    )


def check_one_sgd_step(strategy: str, loss: str, tmp_path: Any) -> None:
    """One SGD step without clipping: the gradient itself, within 1e-5 of TRL's."""
    config = {"loss_type": [loss], "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    ours, theirs = run_cell(strategy, {**config, **LOSSES[loss], "learning_rate": 0.1}, tmp_path)
    # discopop's sigmoid(beta * delta / 0.05) magnifies the rounding of TRL's sums and of ours alike
    assert relative_update_error(ours, theirs) <= (1e-4 if loss == "discopop" else 1e-5)
    assert_same_log(ours, theirs, skip=("grad_norm",))


def check_five_adamw_steps(strategy: str, loss: str, tmp_path: Any) -> None:
    """Five AdamW steps at 1e-3: loss and metrics of each within 1e-5, the whole update within
    1e-3.
    """
    ours, theirs = run_cell(strategy, {"loss_type": [loss], **LOSSES[loss]}, tmp_path)
    assert_same_log(ours, theirs)
    assert relative_update_error(ours, theirs) <= 1e-3
