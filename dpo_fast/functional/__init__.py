"""The fused ops: log-probs and preference losses from hidden states and LM head, without logits."""

from dpo_fast.functional.fused import FusedDPOOutput, fused_linear_dpo
from dpo_fast.functional.linear import linear_logprobs
from dpo_fast.functional.pair_stats import PairGroup
from dpo_fast.functional.sequence import sequence_logprobs
from dpo_fast.naive import HeadLoRA, LinearLogprobs

__all__ = [
    "FusedDPOOutput",
    "HeadLoRA",
    "LinearLogprobs",
    "PairGroup",
    "fused_linear_dpo",
    "linear_logprobs",
    "sequence_logprobs",
]
