"""What a reference is to the trainer: log-probs of a batch, and what a checkpoint must keep of it.

P pairs, S = 2P sequences (all chosen first, then all rejected), N scored tokens, H hidden.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dpo_fast.models import Head

REFERENCE_NAMES = ("frozen", "adapter", "precomputed", "ema")

# A planned batch (dpo_fast.batch.PlannedCollator) on the device of the model.
Batch = Mapping[str, Any]


@runtime_checkable
class Reference(Protocol):
    """The fixed (or slowly moving) policy that DPO's log-ratios are taken against.

    ``name`` is one of ``REFERENCE_NAMES``; ``module`` is a model of its own, or None where the
    strategy holds none (adapters, precomputed).
    """

    name: str
    module: nn.Module | None

    def logps(self, batch: Batch) -> Tensor:
        """``[S]`` float32 log-probs of the completions, LD-DPO's weights applied; no gradient."""
        ...

    def hidden(self, batch: Batch) -> tuple[Tensor, Head] | None:
        """``(hidden [N, H], head)`` for one head pass over both models; None: use ``logps``.

        None where there is no model to run (precomputed), where the head's weight is only there
        during the forward (sharded), or where the head transforms its logits differently from the
        policy's.
        """
        ...

    def on_step_end(self, step: int) -> None:
        """Called once after each optimizer step with the number of steps done (1, 2, ...)."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What training has changed, to be stored in a checkpoint; empty for a fixed reference."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: names, shapes or dtypes differ, or a fixed reference is given a state.
        """
        ...

    def fingerprint(self) -> str:
        """Identity of the reference that training *started* from: hex digest of weights and config.

        Equal across processes, and for strategies that answer with the same weights.
        """
        ...

    def describe(self) -> str:
        """One line for the log: what answers, and what it holds in memory."""
        ...
