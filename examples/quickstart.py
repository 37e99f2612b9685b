"""DPO with dpo_fast.Trainer: python examples/quickstart.py [MODEL]"""

import sys

from offline import ARGUMENTS, model_and_tokenizer, pairs

import dpo_fast


def main(path: str | None = None) -> float:
    """Trains, and returns the last logged reward margin."""
    model, tokenizer = model_and_tokenizer(path)
    trainer = dpo_fast.Trainer(
        model=model,
        args=dpo_fast.DPOConfig(output_dir="runs/quickstart", beta=0.1, **ARGUMENTS),
        train_dataset=pairs(),
        processing_class=tokenizer,
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "rewards/margins" in entry][-1]
    print(f"margin {last['rewards/margins']:.2f}, accuracy {last['rewards/accuracies']:.0%}")
    return last["rewards/margins"]


if __name__ == "__main__":
    main(*sys.argv[1:])
