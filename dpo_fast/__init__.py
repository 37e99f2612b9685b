"""dpo_fast: Direct Preference Optimization without logits, with four reference strategies.

``import dpo_fast`` touches no GPU, compiles nothing and patches nothing; public names are loaded at
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_LAZY = {
    "Trainer": "dpo_fast.trainer",
    "DPOConfig": "dpo_fast.config",
    "DataCollatorForPreference": "dpo_fast.data.collate",
    "FusedLinearDPOLoss": "dpo_fast.functional.liger_compat",
    "patch": "dpo_fast.integrations.patching",
    "unpatch": "dpo_fast.integrations.patching",
    "patch_model": "dpo_fast.integrations.causal_lm",
    "unpatch_model": "dpo_fast.integrations.causal_lm",
}
_SUBMODULES = (
    "batch",
    "backends",
    "data",
    "functional",
    "integrations",
    "losses",
    "models",
    "naive",
    "reference",
)

__all__ = [
    "DPOConfig",
    "DataCollatorForPreference",
    "FusedLinearDPOLoss",
    "Trainer",
    "__version__",
    "patch",
    "patch_model",
    "unpatch",
    "unpatch_model",
]

if TYPE_CHECKING:
    from dpo_fast.config import DPOConfig
    from dpo_fast.data.collate import DataCollatorForPreference
    from dpo_fast.functional.liger_compat import FusedLinearDPOLoss
    from dpo_fast.integrations.causal_lm import patch_model, unpatch_model
    from dpo_fast.integrations.patching import patch, unpatch
    from dpo_fast.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"dpo_fast.{name}")
    else:
        raise AttributeError(f"module 'dpo_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})
