"""The compiled module, where this installation has it."""

from functools import cache
from types import ModuleType


@cache
def compiled() -> ModuleType | None:
    """``dpo_fast._C``, or None where it was not built: what is chosen then says so in the log."""
    try:
        from dpo_fast import _C
    except ImportError:
        return None
    return _C
