"""Trainings whose peak is planned and measured: large enough that tensors outweigh the rest."""

from dataclasses import dataclass, field
from typing import Any

from dpo_fast.plan import Setting
from dpo_fast.plan.batches import batches_of_lengths


@dataclass(frozen=True)
class Case:
    """A model, pairs and a way to train."""

    setting: Setting
    family: str = "llama"
    pairs: int = 4
    prompt: tuple[int, ...] = (96, 61, 128, 40)
    chosen: tuple[int, ...] = (64, 97, 33, 80)
    rejected: tuple[int, ...] = (72, 50, 90, 41)
    accumulation: int = 1
    workspace: int | None = None
    overrides: Any = field(default_factory=dict)

    def config(self) -> Any:
        """Of a model with some million parameters."""
        from transformers import AutoConfig

        fields = {
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 8192,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 2,
        }
        return AutoConfig.for_model(self.family, **{**fields, **self.overrides})

    def lora(self) -> Any:
        """The adapter of LoRA cases."""
        from peft import LoraConfig

        return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")

    def rows(self) -> list[dict[str, Any]]:
        """The pairs of one micro-batch."""
        lengths = (list(numbers) for numbers in (self.prompt, self.chosen, self.rejected))
        return batches_of_lengths(self.pairs, *lengths).largest


# bf16 products are slow on some processors: fewer of them.
_NARROW = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
}
_SHORT = {"pairs": 2, "prompt": (48, 27), "chosen": (32, 41), "rejected": (36, 20)}

CASES = {
    "full-fp32-padded-frozen": Case(Setting("full", "fp32", False, "padded", "frozen")),
    "full-fp32-packed-precomputed": Case(Setting("full", "fp32", False, "packed", "precomputed")),
    "full-fp32-shared-ema": Case(Setting("full", "fp32", False, "shared_prefix", "ema")),
    "full-mixed-padded-precomputed": Case(
        Setting("full", "mixed", False, "padded", "precomputed"),
        family="qwen3",
        overrides=_NARROW,
        **_SHORT,
    ),
    "full-mixed-checkpointing-shared-frozen": Case(
        Setting("full", "mixed", True, "shared_prefix", "frozen"),
        accumulation=2,
        overrides=_NARROW,
        **_SHORT,
    ),
    "full-bf16-checkpointing-padded-frozen": Case(
        Setting("full", "bf16", True, "padded", "frozen"),
        overrides={**_NARROW, "tie_word_embeddings": True},
        **_SHORT,
    ),
    "lora-fp32-checkpointing-padded-adapter": Case(
        Setting("lora", "fp32", True, "padded", "adapter")
    ),
    "lora-mixed-packed-ema": Case(
        Setting("lora", "mixed", False, "packed", "ema"), overrides=_NARROW, **_SHORT
    ),
    "lora-bf16-shared-precomputed": Case(
        Setting("lora", "bf16", False, "shared_prefix", "precomputed"), overrides=_NARROW, **_SHORT
    ),
    "full-fp32-small-workspace": Case(
        Setting("full", "fp32", False, "packed", "frozen"), workspace=4 * 2**20
    ),
}
