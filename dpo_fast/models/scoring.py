"""A forward that runs the backbone and hands hidden states and LM head to a scoring function: never
logits.

The scoring function runs *inside* the model's forward, and there in place of the head's own, so
that the hooks of FSDP2 and DeepSpeed, which gather the head's weight around either, are in force,
and the wrappers of DDP see the whole graph.

Legend: B rows, T padded length, N scored tokens, H hidden, V vocabulary.
"""

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.batch import (
    COUNT_KEYS,
    GROUPS_KEY,
    PLAN_KEYS,
    RIGHT_PADDED_KEY,
    SEGMENTS_KEY,
    SHIFT_KEY,
    WHOLE_LENS_KEY,
    TokenPlan,
)
from dpo_fast.models.backbone import run_backbone
from dpo_fast.models.head import Head, base_causal_lm, head_of
from dpo_fast.models.head_call import in_head_forward
from dpo_fast.models.right_padded import causal_without_mask
from dpo_fast.models.tensor_parallel import local_head, whole_hidden

_ORIGINAL = "_dpo_fast_original_forward"
# Keys of a batch that are not the model's.
NON_MODEL_KEYS = (
    *PLAN_KEYS,
    *COUNT_KEYS,
    GROUPS_KEY,
    RIGHT_PADDED_KEY,
    "completion_mask",
    "labels",
    SHIFT_KEY,
    WHOLE_LENS_KEY,
    "ref_chosen_logps",
    "ref_rejected_logps",
)


class SegmentsIgnored(RuntimeError):
    """A model got packed rows, and none of its attention layers read which tokens see which."""


class ScoredOutput(NamedTuple):
    """``value``: what the scoring function returned; ``aux_loss``: MoE load balancing loss (scalar)
    or None.
    """

    value: Any
    aux_loss: Tensor | None


def install_scoring(model: nn.Module) -> None:
    """Teach this instance ``model(..., scoring=fn)``; without ``scoring`` the forward is the
    original one.

    Equivalent to ``fn(model.base_model(...).last_hidden_state, head_of(model))``. Idempotent. Undo
    it with :func:`uninstall_scoring`. Works below PEFT and DDP wrappers, which pass keywords
    through.
    """
    model = base_causal_lm(model)
    if hasattr(model, _ORIGINAL):
        return
    # Bound methods in the instance's dict follow a deepcopy; a closure over the original would not.
    setattr(model, _ORIGINAL, model.forward)

    def forward(
        self: nn.Module,
        *args: Any,
        scoring: Callable[[Tensor, Head], Any] | None = None,
        router_mask: Tensor | None = None,
        row_groups: Any = None,
        **kwargs: Any,
    ) -> Any:
        if scoring is None:
            return getattr(self, _ORIGINAL)(*args, **kwargs)
        if row_groups is not None and not args:
            hidden = row_groups.run(_last_hidden_state(self), kwargs)
            if hidden is not None:
                lm = base_causal_lm(self)
                return ScoredOutput(scoring(hidden, local_head(head_of(lm), lm)), None)
        return _run_scored(self, args, kwargs, scoring, router_mask)

    # `generate` validates its arguments against the forward's signature.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def uninstall_scoring(model: nn.Module) -> None:
    """Give the instance its original forward back."""
    model = base_causal_lm(model)
    if hasattr(model, _ORIGINAL):
        delattr(model, _ORIGINAL)
        model.__dict__.pop("forward", None)


def forward_scored(
    model: nn.Module,
    batch: Mapping[str, Any],
    fn: Callable[[Tensor, Head], Any],
    *,
    aux_loss: bool = False,
) -> ScoredOutput:
    """Run ``model`` (any wrapper) on a planned batch and return ``fn(hidden [N, H], head)``.

    Args:
        model: a causal LM on which :func:`install_scoring` was called.
        batch: model inputs and the keys of :class:`dpo_fast.batch.TokenPlan`; other keys go to the
            model.
        fn: called once, inside the forward, with the hidden states that predict the N scored
            tokens. Of a tensor-parallel model it gets whole hidden states and this rank's rows of
            the head; ``head.kwargs()`` then holds the group that the ops reduce over.
        aux_loss: ask a mixture-of-experts model for its load balancing loss.
    """
    plan = TokenPlan.from_batch(batch)
    inputs = {k: v for k, v in batch.items() if k not in NON_MODEL_KEYS}
    inputs["use_cache"] = False
    if aux_loss:
        inputs["output_router_logits"] = True
        inputs["router_mask"] = batch.get("attention_mask")
    elif GROUPS_KEY in batch:  # the router's statistics are of all tokens at once
        inputs[GROUPS_KEY] = batch[GROUPS_KEY]
    if SEGMENTS_KEY in batch:
        if not aux_loss:  # the router's statistics are of all tokens
            inputs[SEGMENTS_KEY] = batch[SEGMENTS_KEY].for_scored()
        # Who sees whom is in the segments: transformers hands a 4-D mask on as it is, while from a
        # 2-D mask it would build L x L, and from position_ids alone it would cut answers off their
        # shared prompt.
        inputs["attention_mask"] = torch.ones(
            (1, 1, 1, 1), dtype=torch.bool, device=batch["attention_mask"].device
        )

    def scoring(hidden_states: Tensor, head: Head) -> Any:
        # With `device_map` the backbone may end on another device than the head.
        return fn(plan.gather(hidden_states).to(head.weight.device), head)

    with causal_without_mask(batch.get(RIGHT_PADDED_KEY, False)):
        return model(**inputs, scoring=scoring)


def _last_hidden_state(model: nn.Module) -> Callable[..., Tensor]:
    backbone: Any = base_causal_lm(model).base_model
    return lambda **inputs: whole_hidden(backbone(**inputs)[0])


def _run_scored(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    scoring: Callable[[Tensor, Head], Any],
    router_mask: Tensor | None,
) -> ScoredOutput:
    lm = base_causal_lm(model)
    segments = kwargs.get(SEGMENTS_KEY)
    calls = segments.num_calls if segments is not None else 0
    outputs = run_backbone(partial(lm.base_model, *args), kwargs)
    if segments is not None and segments.num_calls == calls:
        raise SegmentsIgnored(
            f"{type(lm).__name__} got packed rows, but its attention "
            f"({lm.config._attn_implementation!r}) ignores the segments and mixes the sequences: "
            "run it inside dpo_fast.layouts.segment_attention_in(model); where that is done, its "
            "family needs batch_layout='padded'."
        )
    layer: Any = lm.get_output_embeddings()
    if layer is None:
        head_of(lm)  # raises: there is no head
    value = in_head_forward(
        layer,
        whole_hidden(outputs[0]),
        lambda hidden: scoring(hidden, local_head(head_of(lm), lm)),
    )
    aux = None
    if kwargs.get("output_router_logits"):
        mask = kwargs.get("attention_mask") if router_mask is None else router_mask
        aux = _load_balancing_loss(lm, outputs.router_logits, mask)
    return ScoredOutput(value, aux)


def _load_balancing_loss(
    lm: nn.Module, router_logits: Any, attention_mask: Tensor | None
) -> Tensor:
    """The family's own load balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4-6, as
    transformers has it).
    """
    function: Any = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    if function is None:
        from transformers.models.mixtral.modeling_mixtral import (
            load_balancing_loss_func as function,
        )
    config = lm.config.get_text_config()  # type: ignore[operator, union-attr]
    return function(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
