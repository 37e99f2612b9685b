"""TRL 0.24's DPOTrainer on tiny models, where ``make test-integrations`` runs."""

import copy
from typing import Any

import pytest
import torch

from tests.sgd import sgd_arguments
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
    """A DPOTrainer of TRL 0.24, of three SGD steps."""
    import trl

    model = tiny_model(family)
    config = {
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
        args=trl.DPOConfig(**sgd_arguments(**config)),
        train_dataset=rows(16),
        processing_class=tiny_tokenizer(),
        **more,
    )
