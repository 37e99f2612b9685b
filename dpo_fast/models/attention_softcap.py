"""A softcap of attention scores that an attention implementation would leave out."""

import warnings

from torch import nn

from dpo_fast.models.head import base_causal_lm


def warn_if_softcap_is_left_out(model: nn.Module) -> None:
    """Warn of a model with ``attn_logit_softcapping`` that runs under transformers' sdpa.

    ``torch.nn.functional.scaled_dot_product_attention`` knows no softcap. transformers before 5.23
    takes it for Gemma 2 by default all the same and drops the softcap without a word, so that
    policy and reference are not the model that was pretrained; from 5.23 on it raises in the
    forward.
    """
    lm = base_causal_lm(model)
    softcap = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is None or getattr(lm.config, "_attn_implementation", None) != "sdpa":
        return
    warnings.warn(
        f"{type(lm).__name__} caps its attention scores at {softcap:g}, and attn_implementation="
        "'sdpa' cannot: padded rows run without the cap. Load policy and reference with "
        "attn_implementation='eager' (or flash_attention_2), or set batch_layout='packed' or "
        "'shared_prefix', whose attention has it.",
        stacklevel=2,
    )
