"""Rows that are padded on the right need no mask in causal attention: no position sees what comes
after it, and nothing is ever scored on padding.

transformers asks the device in every forward whether the padding mask of SDPA is all ones
(``masking_utils._ignore_causal_mask_sdpa``): the host waits, and where there is padding SDPA gets a
``[B, 1, T, T]`` mask, with which it cannot take its fastest kernels. The collator knows on the host
how rows are padded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def causal_without_mask(right_padded: bool) -> Iterator[None]:
    """Inside, layers of full causal attention get no mask from transformers where their model runs
    SDPA; others (sliding windows, prefixes, a cache) get what they get otherwise.
    """
    if not right_padded:
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

    usual, is_local = masks["sdpa"], "sdpa" in masks._local_mapping
    masks["sdpa"] = partial(mask_of_right_padded, usual)
    try:
        yield
    finally:
        if is_local:
            masks["sdpa"] = usual
        else:
            del masks["sdpa"]


def mask_of_right_padded(usual: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A mask function of transformers' ``AttentionMaskInterface``; None: SDPA's ``is_causal``."""
    length, window = options.get("q_length"), options.get("local_size")
    plainly_causal = (
        options.get("allow_is_causal_skip", False)
        and isinstance(length, int)
        and length == options.get("kv_length")
        and isinstance(options.get("q_offset"), int)
        and options["q_offset"] == 0
        and (window is None or length < window)
    )
    return None if plainly_causal else usual(*args, **options)
