"""The gradient of the first factor of an adapter on the head, for every backend in torch's dtypes.

Legend: N scored tokens, H hidden, r rank of the head's adapter.
"""

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadGrads


def lora_a_grad(
    v: Tensor,  # [N]: -dlogp * scale / S
    eb: Tensor,  # [N, r]: E B, unscaled
    x: Tensor,  # [N, H]
    scale: float,
    into: HeadGrads | None,
) -> Tensor:
    """``dA = scale * (v E B)^T X``, ``[r, H]`` in x's dtype; added in place to ``into.lora_a``
    where there is one.
    """
    new = torch.mm((v.unsqueeze(1) * eb).t(), x).mul_(scale)
    old = None if into is None else into.lora_a
    return new if old is None else old.add_(new)
