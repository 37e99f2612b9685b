"""DPO of an adapter; the model with the adapter off is the reference, so there is no second model.

python examples/lora.py [MODEL]
"""

import sys

from offline import ARGUMENTS, model_and_tokenizer, pairs
from peft import LoraConfig

import dpo_fast


def main(path: str | None = None) -> float:
    """Trains, saves the adapter, and returns the last logged reward margin."""
    model, tokenizer = model_and_tokenizer(path)
    trainer = dpo_fast.Trainer(
        model=model,
        args=dpo_fast.DPOConfig(output_dir="runs/lora", **{**ARGUMENTS, "learning_rate": 1e-2}),
        train_dataset=pairs(),
        processing_class=tokenizer,
        # An adapter on the LM head works, too: it goes through the fused head as two factors.
        peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj", "lm_head"]),
    )
    trainer.train()
    trainer.save_model("runs/lora/adapter")
    last = [entry for entry in trainer.state.log_history if "rewards/margins" in entry][-1]
    print(f"{trainer.reference.describe()}; margin {last['rewards/margins']:.2f}")
    return last["rewards/margins"]


if __name__ == "__main__":
    main(*sys.argv[1:])
