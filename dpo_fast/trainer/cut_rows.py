"""Padded rows that several ranks share, each computing other positions of them.

A plan of scored tokens cannot be cut along positions. A batch is cut with ``shift_labels`` in the
plan's place; each rank plans the positions that it got, and sums over sequences are reduced over
the ranks.

Legend: P pairs, T padded length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.batch import IGNORE_INDEX, SHIFT_KEY, is_right_padded, shifted_batch

# The tensors [2P, T] of a batch that is cut.
CUT_KEYS = ("input_ids", "position_ids", SHIFT_KEY)


def cuttable(batch: dict[str, Any], multiple: int, pad_token_id: int) -> dict[str, Any]:
    """A planned batch of padded rows as ranks may share it: ``input_ids``, ``position_ids`` and
    ``shift_labels``, ``[2P, T]`` with T a multiple of ``multiple``, and the batch's values of whole
    pairs.

    ``attention_mask`` is left out: of rows that are padded on the right, no scored position sees
    padding.

    Raises:
        ValueError: rows are packed, or padded on the left, or have another tensor ``[2P, T]``.
    """
    mask = batch.get("attention_mask")
    if mask is not None and not is_right_padded(mask):
        raise ValueError(
            "The batch has rows that are padded on the left, and rows that ranks share are "
            "attended causally without a mask: use a collator that pads on the right, as "
            "dpo_fast's does."
        )
    shifted = {k: v for k, v in shifted_batch(batch).items() if k != "attention_mask"}
    shape = shifted["input_ids"].shape
    for key, value in shifted.items():
        if isinstance(value, Tensor) and value.shape == shape and key not in CUT_KEYS:
            raise ValueError(
                f"The batch has a tensor {key!r} {tuple(shape)} of whole rows, and of rows that "
                f"ranks share only {', '.join(CUT_KEYS)} are cut: leave it out of the collator's "
                "batches."
            )
    missing = -shape[1] % multiple
    for key, value in (("input_ids", pad_token_id), (SHIFT_KEY, IGNORE_INDEX)):
        shifted[key] = F.pad(shifted[key], (0, missing), value=value).contiguous()
    ids: Tensor = shifted["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device)
    shifted["position_ids"] = positions.repeat(ids.shape[0], 1)
    return shifted


def refuse_options(args: Any, cut_by: str) -> None:
    """Raise ValueError for what needs whole rows on each rank; with the remedy.

    Args:
        args: the trainer's config.
        cut_by: who cuts the rows, as the user set it: ``"cp_size=2"``.
    """
    wrong = {
        "batch_layout": args.batch_layout not in ("auto", "padded"),
        "ld_alpha": args.ld_alpha is not None,
        "max_tokens_per_batch": args.max_tokens_per_batch is not None,
        "router_aux_loss_coef": bool(args.router_aux_loss_coef),
        "activation_offloading": args.activation_offloading,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"{name}={getattr(args, name)!r} needs whole rows on each rank, and {cut_by} cuts "
                f"them along their positions: leave {name} at its default, or "
                f"{cut_by.partition('=')[0]} at 1."
            )
