"""A sweep over beta that asks the reference once: python examples/precomputed_sweep.py [MODEL]

The first run computes the reference's log-probs and keeps them on disk; the others find them. The
cache knows weights, tokens, truncation and precision, and nothing else: learning rate, beta and
output folder may change.
"""

import sys

from offline import ARGUMENTS, model_and_tokenizer, pairs

import dpo_fast


def main(path: str | None = None) -> dict[float, int]:
    """Trains once a beta; returns how many pairs each run had to compute."""
    computed = {}
    for beta in (0.05, 0.1, 0.5):
        model, tokenizer = model_and_tokenizer(path)
        args = dpo_fast.DPOConfig(
            output_dir=f"runs/sweep/beta_{beta}",
            beta=beta,
            reference="precomputed",
            ref_cache_dir="runs/sweep/reference",
            **ARGUMENTS,
        )
        trainer = dpo_fast.Trainer(
            model=model, args=args, train_dataset=pairs(), processing_class=tokenizer
        )
        trainer.train()
        computed[beta] = trainer.reference.computed
        last = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry][-1]
        print(
            f"beta {beta}: accuracy {last['rewards/accuracies']:.0%}, "
            f"reference computed for {computed[beta]} pairs"
        )
    return computed


if __name__ == "__main__":
    main(*sys.argv[1:])
