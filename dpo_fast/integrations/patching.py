"""``dpo_fast.patch("trl")``: speeds up a library in use, for good or in a ``with`` block."""

import logging
from importlib import import_module
from types import ModuleType
from typing import Any

logger = logging.getLogger("dpo_fast")

# target -> modules of this package that know a version of it
TARGETS = {
    "trl": ("trl", "trl_classic"),
    "llamafactory": ("llamafactory",),
    "openrlhf": ("openrlhf",),
}


class Patch:
    """What :func:`patch` returns: leave it alone, or use it as a context manager.

    Attributes:
        target: what was patched. applied: whether this call did it; a call that found it patched
            already leaves it patched when its ``with`` block ends.
    """

    def __init__(self, target: str, applied: bool) -> None:
        self.target, self.applied = target, applied

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.applied:
            unpatch(self.target)

    def __repr__(self) -> str:
        return f"Patch(target={self.target!r}, applied={self.applied})"


def patch(target: str, *, backend: str = "auto") -> Patch:
    """Run the library ``target`` on the fused LM head of dpo_fast, from the next step on.

    ::

        dpo_fast.patch("trl")              # until dpo_fast.unpatch("trl")
        with dpo_fast.patch("trl"):        # or for this block alone
            trl.DPOTrainer(...).train()

    Args:
        target: ``"trl"``: the chunked log-probabilities that TRL's DPO, KTO, SFT, GRPO and RLOO
            trainers share, whether these were made before the call or after it. Values and
            gradients stay TRL's up to rounding; see :mod:`dpo_fast.integrations.trl`. In TRL up to
            0.28: its DPOTrainer alone; see :mod:`dpo_fast.integrations.trl_classic`.
            ``"llamafactory"``, ``"openrlhf"``: see the modules of these names.
        backend: of :func:`dpo_fast.functional.linear_logprobs`; a name is obeyed or refused when
            the first batch is scored.

    Patching what is patched already changes nothing.

    Raises:
        ValueError: an unknown target; it is patched already, with another backend.
        ImportError: the library is not installed.
        InterfaceChanged: the library has another interface than the tested one. Nothing was
            patched.
    """
    module = _for_the_installed_version(_modules(target))
    applied = module.apply(backend)
    if applied:
        logger.info("dpo_fast.patch(%r): %s", target, module.describe())
    return Patch(target, applied)


def unpatch(target: str) -> None:
    """Give the library ``target`` back what :func:`patch` replaced; without a patch, do nothing.

    What somebody else has put in the same place since then is left alone.

    Raises:
        ValueError: an unknown target.
    """
    for module in _modules(target):
        module.restore()


def _modules(target: str) -> list[ModuleType]:
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(map(repr, TARGETS))}.")
    return [import_module(f"dpo_fast.integrations.{name}") for name in TARGETS[target]]


def _for_the_installed_version(modules: list[ModuleType]) -> ModuleType:
    """The one that says it knows the version; the newest, whose probe names what is missing."""
    return next((module for module in modules if module.knows()), modules[0])
