"""The reference as a model of its own: a copy of the policy in memory, or the model that was given.

H hidden, N scored tokens.
"""

import copy

import torch
from torch import nn

from dpo_fast.models import base_causal_lm, is_peft_model
from dpo_fast.reference.adapters import adapter_fingerprint
from dpo_fast.reference.checks import check_finite, check_vocabulary
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.reference.scored import ScoredReference, Scoring


class FrozenReference(ScoredReference):
    """A second model: eval mode, ``requires_grad=False``, never trained, never reloaded.

    Memory: all of its weights once more (a 7B model in bf16: 13 GiB).

    Args:
        model: becomes the reference, in place: it is frozen and set to eval mode.
        policy: for the checks.
        scoring: how it is run.

    Raises:
        ValueError: ``model`` is ``policy``, has another vocabulary, or holds NaN or infinite
        weights.
    """

    name = "frozen"

    def __init__(self, model: nn.Module, policy: nn.Module, scoring: Scoring | None = None) -> None:
        if base_causal_lm(model) is base_causal_lm(policy):
            raise ValueError(
                "model and ref_model are the same object, so the reference would move with the "
                "policy: omit ref_model, and a copy is kept for you."
            )
        check_vocabulary(policy, model)
        check_finite(model, "reference")
        model.eval().requires_grad_(False)
        super().__init__(model, policy, scoring)
        self.module = model

    @classmethod
    def copy_of(
        cls,
        policy: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        scoring: Scoring | None = None,
    ) -> "FrozenReference":
        """A reference with the weights that ``policy`` has now, edits in memory included."""
        return cls(frozen_copy(policy, dtype), policy, scoring)

    def _compute_fingerprint(self) -> str:
        if is_peft_model(self.model):
            return adapter_fingerprint(self.model, {}, adapters_off=False)
        return model_fingerprint(base_causal_lm(self.model))

    def describe(self) -> str:
        nbytes = sum(p.nbytes for p in self.model.parameters())
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return f"frozen: a model of its own, {nbytes / 2**30:.2f} GiB of {dtype} weights"


def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Deep copy of ``model`` whose parameters need no gradient.

    With ``dtype``, floating-point parameters in the model's own dtype are cast while they are
    copied, so that no copy in the old dtype ever exists; others (layers kept in float32, quantised
    weights) and buffers stay as they are.
    """
    memo: dict[int, nn.Parameter] = {}
    own = getattr(model, "dtype", None)
    if dtype is not None and dtype != own:
        for param in model.parameters():
            if type(param) is nn.Parameter and param.dtype == own:
                memo[id(param)] = nn.Parameter(param.detach().to(dtype), requires_grad=False)
    duplicate = copy.deepcopy(model, memo)
    if memo and hasattr(base_causal_lm(duplicate), "config"):
        base_causal_lm(duplicate).config.dtype = dtype
    return duplicate.requires_grad_(False)
