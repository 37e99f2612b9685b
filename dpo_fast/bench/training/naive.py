"""DPO steps written by hand over a transformers model, with full logits.

Legend: P pairs, S = 2P sequences (all chosen first), T padded length, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_fast.bench.heads.variants import target_logps_by_row
from dpo_fast.bench.workload import Row
from dpo_fast.data.collate import DataCollatorForPreference

BETA = 0.1
Batch = dict[str, Tensor]
Reference = Callable[[Batch], Tensor]


class NaiveLoop:
    """What one writes after reading the paper: full logits of both models, log-softmax, gather,
    sum.

    Args:
        policy: the model that is trained.
        reference: ``logps(batch) -> [S]``, or a frozen model.
    """

    def __init__(self, policy: nn.Module, reference: "nn.Module | Reference") -> None:
        self.policy = policy
        if isinstance(reference, nn.Module):
            frozen = reference.eval().requires_grad_(False)
            reference = lambda batch: self.logps(frozen, batch)
        self.reference = reference
        self.collator = DataCollatorForPreference(pad_token_id=0, max_length=None)

    def loss(self, rows: list[Row]) -> Tensor:
        """The mean sigmoid loss of the pairs."""
        device = next(self.policy.parameters()).device
        batch = {k: v.to(device) for k, v in self.collator(rows).items() if torch.is_tensor(v)}
        logps = self.logps(self.policy, batch)
        with torch.no_grad():
            ref = self.reference(batch)
        chosen, rejected = (logps - ref).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probs of the answers, ``[S]``."""
        target, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
        per_token = self.per_token(_logits(model, batch)[:, :-1], target)
        return (per_token * mask).sum(-1)

    @staticmethod
    def per_token(logits: Tensor, target: Tensor) -> Tensor:
        """Log-probs of ``target [S, T]``."""
        return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


class TRL024Loop(NaiveLoop):
    """The formula of TRL 0.24's ``concatenated_forward``: full logits of padded rows, labels rolled
    by one, log-probs row by row, means of the logits for the metrics.
    """

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = _logits(model, batch)
        labels = torch.roll(batch["input_ids"], shifts=-1, dims=1)
        mask = torch.roll(batch["completion_mask"], shifts=-1, dims=1).bool()
        per_token = target_logps_by_row(logits, labels.masked_fill(~mask, 0))
        per_token = per_token.masked_fill(~mask, 0.0)
        with torch.no_grad():
            for half, scored in zip(logits.chunk(2), mask.chunk(2), strict=True):
                half[scored].mean()
        return torch.roll(per_token, shifts=1, dims=1)[:, 1:].sum(-1)


class LigerLoop:
    """TRL 0.24's ``use_liger_loss`` path: Liger's chunked DPO loss on the hidden states."""

    def __init__(self, policy: nn.Module, reference: nn.Module, loss: Any) -> None:
        self.policy, self.ref = policy, reference.eval().requires_grad_(False)
        self.of = loss(beta=BETA, use_ref_model=True)
        self.collator = DataCollatorForPreference(pad_token_id=0, max_length=None)

    def loss(self, rows: list[Row]) -> Tensor:
        """The mean sigmoid loss of the pairs."""
        device = next(self.policy.parameters()).device
        batch = {k: v.to(device) for k, v in self.collator(rows).items() if torch.is_tensor(v)}
        hidden = _hidden(self.policy, batch)[:, :-1]
        with torch.no_grad():
            ref_hidden = _hidden(self.ref, batch)[:, :-1]
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
        loss: Tensor = self.of(
            _head(self.policy),
            hidden,
            labels,
            ref_input=ref_hidden,
            ref_weight=_head(self.ref),
        )[0]
        return loss


class CompiledLoop(NaiveLoop):
    """The naive loop with its log-probs (LM head to answer tokens) under torch.compile."""

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        mask = batch["completion_mask"][:, 1:].bool()
        hidden, target = _hidden(model, batch)[:, :-1][mask], batch["input_ids"][:, 1:][mask]
        per_token = _compiled_logps(hidden, _head(model), target)
        return mask.new_zeros(mask.shape, dtype=per_token.dtype).masked_scatter(
            mask, per_token
        ).sum(-1)  # fmt: skip


@torch.compile(dynamic=True)
def _compiled_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    z = (hidden @ weight.T).float()
    return z.gather(1, target[:, None])[:, 0] - z.logsumexp(1)


def _inputs(batch: Batch) -> Batch:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**_inputs(batch), use_cache=False).logits
    return logits


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    backbone: Any = model.base_model
    hidden: Tensor = backbone(**_inputs(batch), use_cache=False).last_hidden_state
    return hidden


def _head(model: nn.Module) -> Tensor:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weight: Tensor = head.weight
    return weight
