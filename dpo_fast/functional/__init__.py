"""The fused ops: log-probs and preference losses without logits, and the EMA of a reference."""

from typing import TYPE_CHECKING, Any

from dpo_fast.backends.shard import VocabShard
from dpo_fast.functional.filter_report import FilterReport, filter_report
from dpo_fast.functional.fused import FusedDPOOutput, fused_linear_dpo
from dpo_fast.functional.liger_compat import FusedLinearDPOLoss
from dpo_fast.functional.linear import linear_logprobs
from dpo_fast.functional.pair_stats import PairGroup
from dpo_fast.functional.sequence import sequence_logprobs
from dpo_fast.naive import HeadLoRA, LinearLogprobs

if TYPE_CHECKING:
    from dpo_fast.functional.ema import ema_

__all__ = [
    "FilterReport",
    "FusedDPOOutput",
    "FusedLinearDPOLoss",
    "HeadLoRA",
    "LinearLogprobs",
    "PairGroup",
    "VocabShard",
    "ema_",
    "filter_report",
    "fused_linear_dpo",
    "linear_logprobs",
    "sequence_logprobs",
]


def __getattr__(name: str) -> Any:
    if name != "ema_":
        raise AttributeError(f"module 'dpo_fast.functional' has no attribute {name!r}")
    from dpo_fast.functional.ema import ema_

    return ema_
