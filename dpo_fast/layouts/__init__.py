"""Batch layouts that compute no token twice: packed rows, shared prefixes, token budgets."""

from dpo_fast.layouts.budget import TokenBudget, collect_rows
from dpo_fast.layouts.choose import LAYOUTS, LayoutChoice, choose_layout, make_collator
from dpo_fast.layouts.install import segment_attention_in
from dpo_fast.layouts.lengths import PairLengths, pair_lengths
from dpo_fast.layouts.packed import PackedCollator, SharedPrefixCollator
from dpo_fast.layouts.sampler import TokenBalancedSampler
from dpo_fast.layouts.segments import Segment, Segments

__all__ = [
    "LAYOUTS",
    "LayoutChoice",
    "PackedCollator",
    "PairLengths",
    "Segment",
    "Segments",
    "SharedPrefixCollator",
    "TokenBalancedSampler",
    "TokenBudget",
    "choose_layout",
    "collect_rows",
    "make_collator",
    "pair_lengths",
    "segment_attention_in",
]
