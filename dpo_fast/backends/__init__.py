"""Backends of the LM head: the interface they share, and the one place that chooses among them."""

from dpo_fast.backends.interface import (
    HeadBackend,
    HeadForward,
    HeadGrads,
    LinearHead,
    Needs,
    Saved,
    buffer_bytes,
)
from dpo_fast.backends.select import (
    NAMES,
    choose,
    choose_sharded,
    cpu_refusal,
    filtered,
    triton_refusal,
)
from dpo_fast.backends.shard import VocabShard

__all__ = [
    "NAMES",
    "HeadBackend",
    "HeadForward",
    "HeadGrads",
    "LinearHead",
    "Needs",
    "Saved",
    "VocabShard",
    "buffer_bytes",
    "choose",
    "choose_sharded",
    "cpu_refusal",
    "filtered",
    "triton_refusal",
]
