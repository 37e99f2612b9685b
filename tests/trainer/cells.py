"""The cells of the parity table: every loss of TRL 1.16 times every reference strategy."""

from collections.abc import Callable
from typing import Any

from tests.tiny import tiny_model
from tests.trainer.parity import Run, both, config_kwargs, perturbed
from tests.trainer.parity_float64 import assert_log_of_trl, assert_update_of_trl, ours_in_float64

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.05},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
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


def strategy_arguments(
    strategy: str, model: Any = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(arguments of both trainers, of both configs, of our config alone) for ``model`` (None: the
    tiny Llama).
    """
    model = tiny_model("llama") if model is None else model
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


ONE_SGD_STEP = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 0.1}


def check_one_sgd_step(
    strategy: str, config: dict[str, Any], tmp_path: Any, model: Any = None
) -> tuple[Run, Run]:
    """One SGD step without clipping: the gradient itself, within 1e-5 of TRL's or the truth."""
    return check_cell(strategy, {**config, **ONE_SGD_STEP}, tmp_path, model, update=1e-5)


def check_five_adamw_steps(
    strategy: str, config: dict[str, Any], tmp_path: Any, model: Any = None
) -> tuple[Run, Run]:
    """Five AdamW steps at 1e-3: the log of each, and the whole update within 1e-3 of TRL's."""
    return check_cell(strategy, config, tmp_path, model, update=1e-3)


def check_cell(
    strategy: str, config: dict[str, Any], tmp_path: Any, model: Any, *, update: float
) -> tuple[Run, Run]:
    """One cell in both trainers: the logs agree, and the updates within ``update``."""
    ours, theirs, gold = run_cell(strategy, config, tmp_path, model)
    assert_update_of_trl(ours, theirs, gold, update)
    assert_log_of_trl(ours, theirs, gold)
    return ours, theirs


def run_cell(
    strategy: str,
    config: dict[str, Any],
    tmp_path: Any,
    model: Any = None,
    eval_dataset: Any = None,
) -> tuple[Run, Run, Callable[[], Run]]:
    """(ours, TRL's, what trains ours in float64) on the same arguments."""
    model = tiny_model("llama") if model is None else model
    arguments, shared, own = strategy_arguments(strategy, model)
    of_trainer = {**arguments.pop("trainer_kwargs", {}), "eval_dataset": eval_dataset}
    cell = {
        "config": config_kwargs(**{**shared, **config}),
        "trainer_kwargs": of_trainer,
        **arguments,
    }
    own_config = {**own, "ref_cache_dir": str(tmp_path / "refs")}
    ours, theirs = both(model, own_config=own_config, **cell)

    def gold() -> Run:
        cache = {"ref_cache_dir": str(tmp_path / "refs_float64")}
        return ours_in_float64(model, own_config={**own_config, **cache}, **cell)

    return ours, theirs, gold
