"""Models with dpo_fast's attention for a while: set through transformers, and restored."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from dpo_fast.layouts.attention import implementation_name, register
from dpo_fast.layouts.last_layer import scored_rows_in_last_layer
from dpo_fast.models import base_causal_lm


@contextmanager
def segment_attention_in(*models: nn.Module | None, backend: str = "auto") -> Iterator[None]:
    """Inside, the models (any wrapper; None is skipped) attend within the segments of packed rows.

    In a pass that reads nothing but scored rows, their last layer computes no others
    (:mod:`dpo_fast.layouts.last_layer`).

    Forwards without segments, such as ``generate``, go on working inside. The backward of a model
    with gradient checkpointing runs attention again: it belongs inside, too.

    Args:
        models: policy, reference, ...
        backend: see :data:`dpo_fast.layouts.attention.BACKENDS`.

    Raises:
        ValueError: a model's attention implementation cannot be set.
    """
    register()
    with ExitStack() as restore:
        for model in models:
            if model is not None:
                restore.enter_context(_attention(model, implementation_name(backend)))
                restore.enter_context(scored_rows_in_last_layer(model))
        yield


@contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[None]:
    lm = base_causal_lm(model)
    before = lm.config._attn_implementation
    if before == name:
        yield
        return
    lm.set_attn_implementation(name)
    if lm.config._attn_implementation != name:
        raise ValueError(
            f"{type(lm).__name__} does not let its attention implementation be set; use "
            "batch_layout='padded'"
        )
    try:
        yield
    finally:
        lm.set_attn_implementation(before)
