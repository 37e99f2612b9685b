"""A reference that runs a model: hidden states, log-probs of tokens and of sequences.

P pairs, S = 2P sequences (all chosen first, then all rejected), N scored tokens, H hidden, V
vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.batch import TokenPlan
from dpo_fast.functional import linear_logprobs, sequence_logprobs
from dpo_fast.layouts import segment_attention_in
from dpo_fast.layouts.joined_rows import has_segments
from dpo_fast.models import Head, forward_scored, head_of, install_scoring
from dpo_fast.reference.inference import inference_pass
from dpo_fast.reference.protocol import Batch


@dataclass(frozen=True)
class Scoring:
    """How a reference is run.

    Attributes:
        ld_alpha: LD-DPO's weight of tokens beyond the shorter answer; None: no such weights.
        autocast_dtype: mixed precision of the reference's forward; None: whatever the caller is in.
        backend: of the LM head (``dpo_fast.functional``).
        workspace: bytes that the LM head may hold; None: its default.
    """

    ld_alpha: float | None = None
    autocast_dtype: torch.dtype | None = None
    backend: str = "auto"
    workspace: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the ops."""
        return {"backend": self.backend, "workspace": self.workspace}


class ScoredReference:
    """Base of the strategies that run a model; subclasses give ``name`` and ``as_reference``."""

    name = ""
    module: nn.Module | None = None
    model: nn.Module  # what is run; `module` is what the user may look at

    def __init__(self, model: nn.Module, policy: nn.Module, scoring: Scoring | None = None) -> None:
        self.model = model
        self.scoring = scoring or Scoring()
        install_scoring(model)
        self._one_head_pass = _transform(head_of(model)) == _transform(head_of(policy))
        self._fingerprint: str | None = None

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, ``self.model`` holds the reference's weights."""
        yield

    def logps(self, batch: Batch) -> Tensor:
        """``[S]`` float32, no gradient."""
        plan = TokenPlan.from_batch(batch)
        alpha = self.scoring.ld_alpha

        def score(hidden: Tensor, head: Head) -> Tensor:
            plan_ = plan.to(hidden.device)
            weight = None if alpha is None else plan_.ld_weight(alpha)
            return sequence_logprobs(
                hidden,
                head.weight,
                plan_.target,
                plan_.cu_seqlens,
                token_weight=weight,
                **head.kwargs(),
                **self.scoring.options,
            )

        return self._run(batch, score)

    def token_logps(self, batch: Batch) -> Tensor:
        """``[N]`` float32 log-probs of the scored tokens, unweighted; no gradient."""
        plan = TokenPlan.from_batch(batch)

        def score(hidden: Tensor, head: Head) -> Tensor:
            target = plan.target.to(hidden.device)
            options = {**head.kwargs(), **self.scoring.options}
            logps = linear_logprobs(hidden, head.weight, target, **options)
            assert isinstance(logps, Tensor)  # no further outputs were asked for
            return logps

        return self._run(batch, score)

    def hidden(self, batch: Batch) -> tuple[Tensor, Head] | None:
        """``(hidden [N, H], head)``; None where the head cannot join the policy's pass."""
        if not self._one_head_pass or _is_sharded(head_of(self.model)):
            return None
        return self._run(batch, lambda hidden, head: (hidden, self._keep(head)))

    def _keep(self, head: Head) -> Head:
        """The head as it may be used once the model holds the policy's weights again."""
        return head

    def _run(self, batch: Batch, score: Any) -> Any:
        packed = self.model if has_segments(batch) else None
        with (
            inference_pass(self.model, self.scoring.autocast_dtype),
            self.as_reference(),
            segment_attention_in(packed),
        ):
            return forward_scored(self.model, batch, score).value

    def on_step_end(self, step: int) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing moves."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless the state is empty."""
        if state:
            raise ValueError(
                f"reference={self.name!r} is fixed and keeps no state, but the checkpoint holds "
                f"{len(state)} reference tensors: it was written with reference='ema'. Resume "
                "with that, or start a new run."
            )

    def fingerprint(self) -> str:
        """Hex digest of weights and config; computed once."""
        if self._fingerprint is None:
            self._fingerprint = self._compute_fingerprint()
        return self._fingerprint

    def _compute_fingerprint(self) -> str:
        raise NotImplementedError


def _transform(head: Head) -> tuple[float | None, float]:
    return head.softcap, head.logit_scale


def _is_sharded(head: Head) -> bool:
    """Whether the weight is whole only inside a forward (FSDP2's DTensor, ZeRO-3's parts)."""
    return hasattr(head.weight, "ds_id") or hasattr(head.weight, "placements")
