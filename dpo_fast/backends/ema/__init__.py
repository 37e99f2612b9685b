"""Backends of the EMA: compiled (C++ and CUDA), Triton, plain torch; select chooses."""

from dpo_fast.backends.ema.philox import PER_COUNTER
from dpo_fast.backends.ema.select import NAMES, choose
from dpo_fast.backends.ema.table import Blend, Draw, EmaBackend, Entry, Table, blend_of

__all__ = [
    "NAMES",
    "PER_COUNTER",
    "Blend",
    "Draw",
    "EmaBackend",
    "Entry",
    "Table",
    "blend_of",
    "choose",
]
