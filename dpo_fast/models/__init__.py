"""What a family of models needs of its LM head, and a forward that ends before the logits."""

from dpo_fast.models.check import check_head
from dpo_fast.models.head import Head, base_causal_lm, head_of, is_peft_model
from dpo_fast.models.scoring import (
    ScoredOutput,
    SegmentsIgnored,
    forward_scored,
    install_scoring,
    uninstall_scoring,
)

__all__ = [
    "Head",
    "ScoredOutput",
    "SegmentsIgnored",
    "base_causal_lm",
    "check_head",
    "forward_scored",
    "head_of",
    "install_scoring",
    "is_peft_model",
    "uninstall_scoring",
]
