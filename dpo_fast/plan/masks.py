"""Attention masks of padded rows that have no values.

Rows that are padded on the right need none (:mod:`dpo_fast.models.right_padded`), and their
attention is causal by a flag, which keeps less. Of others transformers looks into the mask. Fake
tensors cannot be looked into, but what they stand for is known: the mask that transformers would
make is handed to the backbone, which passes a 4-D mask on as it is.

Legend: B rows of a pass through the backbone, T their length.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dpo_fast.batch import GROUPS_KEY, RIGHT_PADDED_KEY
from dpo_fast.models import base_causal_lm
from dpo_fast.plan.fake import FakeModel

_IMPLEMENTATION = "dpo_fast_planned"


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    sdpa = AttentionInterface()["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        causal = mask is not None and mask.numel() == 1 and query.shape[2] > 1
        return sdpa(module, query, key, value, None if causal else mask, **kwargs)

    AttentionInterface.register(_IMPLEMENTATION, attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, AttentionMaskInterface()["sdpa"])


@contextlib.contextmanager
def known_masks(model: FakeModel, batch: Mapping[str, Any]) -> Iterator[None]:
    """Inside, forwards of the model on the padded ``batch`` (real or fake) get the masks that it
    stands for.
    """
    lm: Any = base_causal_lm(model.module)
    full, right_padded = _full_passes(batch), batch.get(RIGHT_PADDED_KEY, False)
    window = getattr(lm.config.get_text_config(), "sliding_window", None)
    before = lm.config._attn_implementation
    eager = before == "eager"

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return args, kwargs
        rows, width = mask.shape
        if eager:  # adds a mask to the scores, also without padding
            dtype = model.setting.weight_dtype
            made = torch.zeros(rows, 1, width, width, dtype=dtype)
        elif full.get((rows, width), False) or (right_padded and (not window or width < window)):
            made = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        else:
            made = torch.ones(rows, 1, width, width, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": made}

    if not eager:
        _register()
        lm.set_attn_implementation(_IMPLEMENTATION)
    handle = lm.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        if not eager:
            lm.set_attn_implementation(before)


def _full_passes(batch: Mapping[str, Any]) -> dict[tuple[int, int], bool]:
    """Of each pass through the backbone, ``(B, T)``: whether its rows have no padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    groups = batch.get(GROUPS_KEY)
    if groups is None:
        passes = [(range(len(lengths)), batch["attention_mask"].shape[1])]
    else:
        passes = list(groups.groups)
    full: dict[tuple[int, int], bool] = {}
    for rows, width in passes:
        key = (len(rows), width)
        full[key] = full.get(key, True) and all(lengths[row] == width for row in rows)
    return full
