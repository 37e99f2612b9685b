"""TR-DPO with an adapter: the reference is a second adapter that follows the first one.

python examples/tr_dpo_adapter.py [MODEL]        (method: arXiv 2404.09656)
"""

import sys

from offline import ARGUMENTS, model_and_tokenizer, pairs
from peft import LoraConfig

import dpo_fast


def main(path: str | None = None) -> int:
    """Trains; returns how often the reference moved."""
    model, tokenizer = model_and_tokenizer(path)
    args = dpo_fast.DPOConfig(
        output_dir="runs/tr_dpo",
        reference="ema",
        ref_model_mixup_alpha=0.6,  # ref = 0.6 * policy + 0.4 * ref
        ref_model_sync_steps=5,  # every 5 optimizer steps
        **{**ARGUMENTS, "learning_rate": 1e-2},
    )
    trainer = dpo_fast.Trainer(
        model=model,
        args=args,
        train_dataset=pairs(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    print(f"{trainer.reference.describe()}; it moved {trainer.reference.updates} times")
    return trainer.reference.updates


if __name__ == "__main__":
    main(*sys.argv[1:])
