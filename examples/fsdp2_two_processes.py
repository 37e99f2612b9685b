"""TR-DPO with everything sharded: policy, gradients, optimizer and the reference that moves.

accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 \\
    examples/fsdp2_two_processes.py [MODEL]

accelerate shards on accelerators only: started with plain python, or on a CPU, every process holds
the whole model. From the shell the same is `dpo-fast train --accelerate-config fsdp2`.
"""

import sys
from typing import Any

from offline import ARGUMENTS, model_and_tokenizer, pairs

import dpo_fast


def share(model: Any) -> float:
    """How much of a model's weights this process holds."""
    whole = list(model.parameters())
    local = [p.to_local() if hasattr(p, "to_local") else p for p in whole]
    return sum(p.numel() for p in local) / sum(p.numel() for p in whole)


def main(path: str | None = None) -> float:
    """Trains, saves one whole model, and returns this process's share of the weights."""
    model, tokenizer = model_and_tokenizer(path)
    args = dpo_fast.DPOConfig(
        output_dir="runs/fsdp2",
        reference="ema",
        ref_model_sync_steps=5,
        **ARGUMENTS,
    )
    trainer = dpo_fast.Trainer(
        model=model, args=args, train_dataset=pairs(), processing_class=tokenizer
    )
    trainer.train()
    held = share(trainer.model)
    rank = trainer.accelerator.process_index
    print(f"{trainer.engine}, process {rank}: {held:.0%} of the policy's weights")
    print(f"{share(trainer.ref_model):.0%} of the reference's, moved {trainer.reference.updates}x")
    trainer.save_model("runs/fsdp2/model")
    return held


if __name__ == "__main__":
    main(*sys.argv[1:])
