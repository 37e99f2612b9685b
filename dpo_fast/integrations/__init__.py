"""dpo_fast inside of other people's training: patches, a patched model, a callback.

Nothing here is loaded before it is asked for, and nothing is patched before ``patch`` is called.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# public name -> module that defines it
_LAZY = {
    "EmaReferenceCallback": "dpo_fast.integrations.ema_callback",
    "FastDPOTrainer": "dpo_fast.integrations.trl_trainer",
    "InterfaceChanged": "dpo_fast.integrations.interface",
    "LogprobsOutput": "dpo_fast.integrations.causal_lm",
    "Patch": "dpo_fast.integrations.patching",
    "patch": "dpo_fast.integrations.patching",
    "patch_model": "dpo_fast.integrations.causal_lm",
    "unpatch": "dpo_fast.integrations.patching",
    "unpatch_model": "dpo_fast.integrations.causal_lm",
}

__all__ = [
    "EmaReferenceCallback",
    "FastDPOTrainer",
    "InterfaceChanged",
    "LogprobsOutput",
    "Patch",
    "patch",
    "patch_model",
    "unpatch",
    "unpatch_model",
]

if TYPE_CHECKING:
    from dpo_fast.integrations.causal_lm import LogprobsOutput, patch_model, unpatch_model
    from dpo_fast.integrations.ema_callback import EmaReferenceCallback
    from dpo_fast.integrations.interface import InterfaceChanged
    from dpo_fast.integrations.patching import Patch, patch, unpatch
    from dpo_fast.integrations.trl_trainer import FastDPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dpo_fast.integrations' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
