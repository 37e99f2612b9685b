"""The reference as a model of its own: a copy of the policy in memory, or the model that was given.

H hidden, N scored tokens.
"""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpo_fast.models import base_causal_lm, is_peft_model
from dpo_fast.reference.adapters import adapter_fingerprint
from dpo_fast.reference.checks import check_finite, check_vocabulary
from dpo_fast.reference.estimate import size_text, weight_bytes
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.reference.layer_stream import LayerStream
from dpo_fast.reference.scored import ScoredReference, Scoring
from dpo_fast.reference.shards import is_unit, local_of, reshard


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
    stream: LayerStream | None = None  # layers that wait in host memory

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
        device: torch.device | None = None,
        scoring: Scoring | None = None,
    ) -> "FrozenReference":
        """A reference with the weights that ``policy`` has now, edits in memory included.

        Args:
            dtype, device: of the copy; None: the policy's.
        """
        return cls(frozen_copy(policy, dtype, device), policy, scoring)

    def offload_layers(self, device: torch.device) -> LayerStream:
        """From here on the layers wait in host memory and come to ``device`` one ahead.

        Raises:
            ValueError: the model cannot be streamed (:class:`LayerStream`).
        """
        self.stream = LayerStream(self.model, device)
        return self.stream

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The model is the reference. Afterwards FSDP2's last units, which would stay gathered for
        a backward that never comes, are dropped.
        """
        try:
            yield
        finally:
            reshard(filter(is_unit, self.model.modules()))

    def _compute_fingerprint(self) -> str:
        if is_peft_model(self.model):
            return adapter_fingerprint(self.model, {}, adapters_off=False)
        return model_fingerprint(base_causal_lm(self.model))

    def describe(self) -> str:
        dtype = str(local_of(next(self.model.parameters())).dtype).removeprefix("torch.")
        return (
            f"frozen: a model of its own, {size_text(weight_bytes(self.model))} of {dtype} weights"
        )


def frozen_copy(
    model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Module:
    """Deep copy of ``model`` whose parameters need no gradient.

    Parameters are cast and moved while they are copied: nothing exists twice on the old device or
    in the old dtype. With ``dtype``, floating-point parameters in the model's own dtype are cast;
    others (layers kept in float32, quantised weights) and buffers keep theirs.
    """
    _refuse_bound_forwards(model)
    memo: dict[int, Any] = {}
    own = getattr(model, "dtype", None)
    for param in model.parameters():
        if type(param) is nn.Parameter:
            target = dtype if param.dtype == own else None
            values = param.detach().to(device=device, dtype=target, copy=True)
            memo[id(param)] = nn.Parameter(values, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to(device=device, copy=True)
    try:
        duplicate: Any = copy.deepcopy(model, memo)
    except (
        RuntimeError
    ) as error:  # a module holds a tensor with a history, such as tied LoRA factors
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error}). Use reference='adapter' with "
            "PEFT, or give ref_model."
        ) from error
    lm: Any = base_causal_lm(duplicate)
    if dtype is not None and hasattr(lm, "config"):
        lm.config.dtype = dtype
    return duplicate.requires_grad_(False)


def _refuse_bound_forwards(model: nn.Module) -> None:
    """transformers' tensor parallel layers close over the module they were made for: in a copy
    they would run the policy's weights, and the reference would move with the policy.
    """
    split = any(hasattr(param, "placements") for param in model.parameters())
    bound = [
        name
        for name, module in model.named_modules()
        if isinstance(module.__dict__.get("forward"), types.FunctionType)
    ]
    if split and bound:
        raise ValueError(
            f"{type(model).__name__} is tensor parallel (tp_plan), and a copy of its layers "
            f"({bound[0]} and {len(bound) - 1} more) would run the policy's own weights: give "
            "ref_model, loaded with the same tp_plan, or use reference='precomputed'."
        )
