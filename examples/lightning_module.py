"""DPO in Lightning: python examples/lightning_module.py [MODEL]

The model is patched before Lightning's strategy wraps it; everything else is a plain module.
"""

import copy
import sys
from typing import Any

import lightning
import torch
from offline import model_and_tokenizer, pairs
from torch.utils.data import DataLoader

import dpo_fast
from dpo_fast.data import prepare_dataset
from dpo_fast.losses import sigmoid


class DPOModule(lightning.LightningModule):
    """Policy and frozen reference; log-probs without logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.policy = dpo_fast.patch_model(model)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.reference.eval()  # Lightning puts every submodule into training mode
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logps = self.policy(**inputs, labels=labels, return_logprobs="sequence").logps
        with torch.no_grad():
            ref_logps = self.reference(**inputs, labels=labels, return_logprobs="sequence").logps
        out = sigmoid(*logps.chunk(2), *ref_logps.chunk(2), beta=0.1)
        self.log("margin", (out.chosen_rewards - out.rejected_rewards).mean(), prog_bar=True)
        return out.losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=2e-3)


def main(path: str | None = None, **options: Any) -> float:
    """Trains one epoch; returns the margin of the last batch."""
    model, tokenizer = model_and_tokenizer(path)
    dataset, _ = prepare_dataset(pairs(), tokenizer, max_length=512)
    collator = dpo_fast.DataCollatorForPreference(tokenizer.pad_token_id, max_length=512)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collator)
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **options)
    trainer.fit(DPOModule(model), loader)
    return float(trainer.logged_metrics["margin"])


if __name__ == "__main__":
    main(*sys.argv[1:])
