"""TRL 0.24's DPOTrainer on tiny models, where ``make test-integrations`` runs."""

import copy
import tempfile
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import perturbed, rows

NEEDED = "needs TRL up to 0.28: make test-integrations"


def classic_trl() -> Any:
    """The module ``trl``; skips the tests of the importing module where it is another one."""
    trl = pytest.importorskip("trl", reason=f"trl is not installed; {NEEDED}")
    if not hasattr(trl.DPOTrainer, "concatenated_forward"):
        pytest.skip(f"trl {trl.__version__} is installed; {NEEDED}", allow_module_level=True)
    return trl


def trainer(
    family: str = "llama", *, reference: bool = True, peft: bool = False, **own: Any
) -> Any:
    """A DPOTrainer of TRL 0.24: three SGD steps, so that parameters move by their gradients."""
    import trl

    model = tiny_model(family)
    config = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
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
        "beta": 0.2,
        "max_length": 24,
        "max_prompt_length": 16,
        **own,
    }
    more: dict[str, Any] = {}
    if peft:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj", "lm_head"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
    torch.manual_seed(0)
    return trl.DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=perturbed(model) if reference and not peft else None,
        args=trl.DPOConfig(**config),
        train_dataset=rows(16),
        processing_class=tiny_tokenizer(),
        **more,
    )


def parameters(model: Any) -> torch.Tensor:
    """All trained parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def run(**options: Any) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """What a training logged, and how far it moved the parameters."""
    made = trainer(**options)
    before = parameters(made.model)
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return log, parameters(made.model) - before
