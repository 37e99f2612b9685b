"""DPO in a loop of your own, without any trainer: python examples/raw_pytorch_loop.py [MODEL]

In Accelerate and Lightning loops the same lines work: patch the model before it is prepared.
"""

import copy
import sys

import torch
from offline import model_and_tokenizer, pairs
from torch.utils.data import DataLoader

import dpo_fast
from dpo_fast.data import prepare_dataset
from dpo_fast.losses import sigmoid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sequence_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probs of the answers, [2P]: the chosen ones, then the rejected ones. No logits."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model(**inputs, labels=labels, return_logprobs="sequence").logps


def main(path: str | None = None) -> float:
    """Trains; returns the margin of the last batch."""
    model, tokenizer = model_and_tokenizer(path)
    policy = dpo_fast.patch_model(model.to(DEVICE))
    reference = copy.deepcopy(policy).eval().requires_grad_(False)

    dataset, _ = prepare_dataset(pairs(), tokenizer, max_length=512)
    collator = dpo_fast.DataCollatorForPreference(tokenizer.pad_token_id, max_length=512)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    policy.train()
    for step, batch in enumerate(loader):
        batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        with torch.no_grad():
            ref_logps = sequence_logps(reference, batch)
        logps = sequence_logps(policy, batch)
        out = sigmoid(*logps.chunk(2), *ref_logps.chunk(2), beta=0.1)
        out.losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        margin = (out.chosen_rewards - out.rejected_rewards).mean()
        if step % 10 == 0:
            print(f"step {step}: loss {out.losses.mean():.4f}, margin {margin:.2f}")
    return float(margin)


if __name__ == "__main__":
    main(*sys.argv[1:])
