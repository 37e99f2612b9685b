"""A few tokens through the model in two layouts: what structure alone does not show.

Legend: P pairs, N scored tokens, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.batch import PlannedCollator
from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.layouts.attention import UnsupportedAttention
from dpo_fast.layouts.install import segment_attention_in
from dpo_fast.layouts.packed import PackedCollator
from dpo_fast.models import SegmentsIgnored, base_causal_lm, forward_scored, install_scoring

# Relative to the norm of a hidden state; wrong attention is off by 0.01 to 1.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
_LENGTHS = ((7, 4, 5), (2, 6, 1))  # prompt, chosen, rejected


def can_probe(model: nn.Module) -> bool:
    """Whether the weights are whole and here: not sharded (FSDP2, ZeRO-3), not on ``meta``."""
    return not any(
        p.is_meta or hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters()
    )


@torch.no_grad()
def probe_error(model: nn.Module, collator: PackedCollator, backend: str = "auto") -> str | None:
    """None if ``model`` computes from ``collator``'s rows what it computes from padded ones.

    Two pairs of a few random tokens in eval mode, once padded under the model's own attention, once
    packed; the hidden states that predict the scored tokens must agree within rounding. Otherwise
    the reason.
    """
    install_scoring(model)
    lm = base_causal_lm(model)
    rows = _rows(lm.config.get_text_config().vocab_size)
    padded = PlannedCollator(DataCollatorForPreference(pad_token_id=0))
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        expected = _hidden(model, padded(rows))
        with segment_attention_in(model, backend=backend):
            found = _hidden(model, collator(rows))
    except UnsupportedAttention as refusal:
        return str(refusal)
    except SegmentsIgnored:
        return f"{type(lm).__name__} does not call the attention that is set for it"
    finally:
        for module in training:
            module.training = True
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if error <= _TOLERANCE.get(lm.dtype, 1e-3):
        return None
    return f"{type(lm).__name__} computes other hidden states from packed rows (by {error:.1e})"


def _hidden(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    device = next(base_causal_lm(model).get_input_embeddings().parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return forward_scored(model, moved, lambda hidden, head: hidden).value.double()


def _rows(vocab: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {
            name: torch.randint(1, vocab, (n,), generator=generator).tolist()
            for name, n in zip(names, lengths, strict=True)
        }
        for lengths in _LENGTHS
    ]
