"""Checks of a model before hours of training against it: finite weights, one vocabulary."""

from typing import Any

import torch
from torch import nn


def check_finite(module: nn.Module, what: str) -> None:
    """Raise if a floating-point weight holds NaN or an infinity.

    One pass of ``aminmax`` over the weights (20 GiB/s on a CPU core, bf16 included; a ``sum`` or
    ``isnan`` of bf16 runs at 1 GiB/s), one host sync. Minimum and maximum of a tensor with a NaN
    are NaN.

    Args:
        module: parameters on the meta device are skipped.
        what: how the message calls it, e.g. ``"reference"``.

    Raises:
        ValueError: names the first such tensor and how many others there are.
    """
    names, extremes = [], []
    for name, param in module.named_parameters():
        if not param.is_floating_point() or param.is_meta:
            continue
        values = _plain(param.detach())
        if values.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(values)).float())
    by_device: dict[torch.device, list[int]] = {}
    for i, extreme in enumerate(extremes):
        by_device.setdefault(extreme.device, []).append(i)
    broken: list[int] = []
    for rows in by_device.values():
        finite = torch.stack([extremes[i] for i in rows]).isfinite().all(dim=1).tolist()
        broken += [i for i, ok in zip(rows, finite, strict=True) if not ok]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ValueError(
            f"The {what}'s weight {names[min(broken)]!r}{more} holds NaN or infinite values: the "
            "file or the step that made it is broken, and every loss would be NaN. Reload or "
            f"repair the {what}."
        )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # each rank looks at its own shard; float8 has no comparison, and bf16 holds all of its values
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.bfloat16() if tensor.element_size() == 1 else tensor


def check_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    """Raise unless both models read and score the same number of tokens.

    Raises:
        ValueError: names both sizes and the remedy.
    """
    ours, theirs = vocabulary_sizes(policy), vocabulary_sizes(reference)
    if ours != theirs:
        raise ValueError(
            f"Policy and reference have different vocabularies: {ours[0]} input and {ours[1]} "
            f"output tokens against {theirs[0]} and {theirs[1]}. Log-ratios over different "
            "vocabularies mean nothing: use a reference with the policy's tokenizer, or, if only "
            "tokens were added, resize both with model.resize_token_embeddings(len(tokenizer))."
        )


def vocabulary_sizes(model: nn.Module) -> tuple[int, int]:
    """Rows of the input embeddings and columns of the logits."""
    from dpo_fast.models import base_causal_lm, head_of

    embeddings: Any = base_causal_lm(model).get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None:
        rows = embeddings.weight.shape[0]
    return int(rows), int(head_of(model).weight.shape[0])
