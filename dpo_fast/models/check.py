"""A probe that the LM head was read rightly: a few tokens through the model's own logits and
through ours.
"""

import torch
from torch import nn

from dpo_fast.models.head import base_causal_lm
from dpo_fast.models.scoring import install_scoring
from dpo_fast.models.tensor_parallel import is_dtensor
from dpo_fast.naive import naive_logits


@torch.no_grad()
def check_head(model: nn.Module) -> float:
    """Compare ``model(ids).logits`` with the head's formula on three tokens; return the largest
    difference.

    A family that does something to its logits that :func:`dpo_fast.models.head_of` does not know
    would train on wrong log-probabilities without a word; this finds it before the first step. It
    costs one forward of three tokens.

    Raises:
        ValueError: they differ by more than rounding; names the model class and the difference.
    """
    lm = base_causal_lm(model)
    install_scoring(lm)
    device = next(lm.get_input_embeddings().parameters()).device
    vocab = lm.config.get_text_config().vocab_size
    ids = torch.tensor([[1 % vocab, 2 % vocab, 3 % vocab]], device=device)
    mask = torch.ones_like(ids)
    was_training = [m for m in lm.modules() if m.training]
    lm.eval()
    try:
        expected = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if is_dtensor(expected):
            expected = expected.full_tensor()
        expected = expected[0].float()
        hidden, head = lm(
            input_ids=ids, attention_mask=mask, use_cache=False, scoring=lambda h, head: (h, head)
        ).value
        hidden = hidden[0].to(head.weight.device)
        kwargs = head.kwargs()
        shard = kwargs.pop("group", None)
        logits = naive_logits(hidden, head.weight, **kwargs).float().to(expected.device)
        if shard is not None and expected.shape[-1] == shard.total:
            expected = expected[:, shard.start : shard.start + logits.shape[-1]]
    finally:
        for module in was_training:
            module.training = True
    vocab = min(logits.shape[-1], expected.shape[-1])
    if expected.shape[-1] != logits.shape[-1]:
        raise ValueError(
            _message(
                lm, f"its logits have {expected.shape[-1]} columns, its head {logits.shape[-1]}"
            )
        )
    difference = float((logits - expected).abs().max())
    tolerance = 64 * torch.finfo(hidden.dtype).eps * (1.0 + float(expected.abs().max()))
    if difference > tolerance:
        raise ValueError(
            _message(lm, f"logits differ by {difference:.3g} (tolerance {tolerance:.3g})")
        )
    return difference


def _message(model: nn.Module, what: str) -> str:
    return (
        f"{type(model).__name__} does something to its logits that dpo_fast does not know: {what}. "
        "Scoring it without "
        "logits would train on wrong log-probabilities. Please report the model class; until then "
        "use another trainer "
        "for it."
    )
