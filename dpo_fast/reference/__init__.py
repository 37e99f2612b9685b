"""The reference of DPO: four strategies behind one protocol (:class:`Reference`).

A trainer goes through three calls::

    plan = choose_reference(args, model=model, ref_model=ref_model, ...)    # before any work;
    raises reference = build_reference(plan, args, policy=model, ...)              # the policy is
    complete if isinstance(reference, PrecomputedReference):
        dataset = reference.attach(dataset, "train")                        # every dataset
        reference.release()                                                 # then train

and from then on ``reference.hidden(batch)`` or ``reference.logps(batch)`` in each micro-batch and
``reference.on_step_end(step)`` after each optimizer step. Names are loaded at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {
    "REFERENCE_NAMES": "protocol",
    "Reference": "protocol",
    "Scoring": "scored",
    "FrozenReference": "frozen",
    "AdapterReference": "adapter",
    "PrecomputedReference": "precomputed",
    "EmaReference": "ema",
    "ReferencePlan": "choose",
    "choose_reference": "choose",
    "build_reference": "build",
    "CacheError": "cache",
    "LogpsCache": "cache",
    "Precompute": "precompute",
    "check_finite": "checks",
    "check_vocabulary": "checks",
    "model_fingerprint": "fingerprint",
}

__all__ = [
    "REFERENCE_NAMES",
    "AdapterReference",
    "CacheError",
    "EmaReference",
    "FrozenReference",
    "LogpsCache",
    "Precompute",
    "PrecomputedReference",
    "Reference",
    "ReferencePlan",
    "Scoring",
    "build_reference",
    "check_finite",
    "check_vocabulary",
    "choose_reference",
    "model_fingerprint",
]

if TYPE_CHECKING:
    from dpo_fast.reference.adapter import AdapterReference
    from dpo_fast.reference.build import build_reference
    from dpo_fast.reference.cache import CacheError, LogpsCache
    from dpo_fast.reference.checks import check_finite, check_vocabulary
    from dpo_fast.reference.choose import ReferencePlan, choose_reference
    from dpo_fast.reference.ema import EmaReference
    from dpo_fast.reference.fingerprint import model_fingerprint
    from dpo_fast.reference.frozen import FrozenReference
    from dpo_fast.reference.precompute import Precompute
    from dpo_fast.reference.precomputed import PrecomputedReference
    from dpo_fast.reference.protocol import REFERENCE_NAMES, Reference
    from dpo_fast.reference.scored import Scoring


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dpo_fast.reference' has no attribute {name!r}")
    value = getattr(import_module(f"dpo_fast.reference.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
