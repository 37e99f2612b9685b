"""One micro-batch: policy and reference through the LM head, the pair loss, the scalar that is
differentiated.

Legend: P pairs, S = 2P sequences, N scored tokens, H hidden.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.batch import SHIFT_KEY, TokenPlan
from dpo_fast.config import DPOConfig
from dpo_fast.functional import FusedDPOOutput, fused_linear_dpo
from dpo_fast.functional.segments import sum_over_ranks
from dpo_fast.losses import PairStats, PreferenceLoss
from dpo_fast.models import Head, forward_scored
from dpo_fast.reference import Reference
from dpo_fast.trainer.counts import BatchCounts, on_device

TOKEN_OUTPUTS = ("entropy", "mean_logit", "is_top1")


class ObjectiveOutput(NamedTuple):
    """``loss``: this micro-batch's share of the global mean, scalar; the rest is for the
    metrics.
    """

    loss: Tensor
    fused: FusedDPOOutput
    aux_loss: Tensor | None
    plan: TokenPlan


class Objective:
    """``sum over the micro-batch's pairs of losses / num_pairs of the global batch``, plus the MoE
    term.

    The sum over micro-batches and ranks is the exact mean over the pairs of the global batch,
    however they are split.
    """

    def __init__(
        self, args: DPOConfig, loss: PreferenceLoss, router_aux_loss_coef: float = 0.0
    ) -> None:
        self.args = args
        self.loss = loss
        self.router_aux_loss_coef = router_aux_loss_coef

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        reference: Reference | None,
        counts: BatchCounts | None = None,
        *,
        token_stats: bool = False,
        sequence_group: Any = None,
    ) -> ObjectiveOutput:
        """Score one planned batch.

        Args:
            model: the policy, as the engine wrapped it.
            batch: the collator's dict on the device.
            reference: None where the loss needs none.
            counts: of the global batch; None: this batch is all there is.
            token_stats: also compute entropy, mean logit and top-1 of every scored token.
            sequence_group: over which rows may be cut; a batch with ``shift_labels`` is.
        """
        group = sequence_group if SHIFT_KEY in batch else None
        plan = TokenPlan.from_batch(batch)
        counts = counts or _own_counts(plan, group, batch[SHIFT_KEY].device if group else None)
        ref_kwargs = self._reference(reference, batch, group)

        def score(hidden: Tensor, head: Head) -> FusedDPOOutput:
            return self._score(hidden, head, plan, counts, ref_kwargs, token_stats, group)

        scored = forward_scored(model, batch, score, aux_loss=self.router_aux_loss_coef != 0.0)
        loss = scored.value.loss
        if scored.aux_loss is not None:
            share = plan.num_pairs / counts.num_pairs
            loss = loss + self.router_aux_loss_coef * share * scored.aux_loss
        return ObjectiveOutput(loss, scored.value, scored.aux_loss, plan)

    def _reference(
        self, reference: Reference | None, batch: Mapping[str, Any], group: Any
    ) -> dict[str, Any]:
        """What ``fused_linear_dpo`` is told about the reference: hidden states and head, or
        finished log-probs.
        """
        if reference is None:
            return {}
        with torch.no_grad():
            pair = reference.hidden(batch)
            if pair is None:
                logps = reference.logps(batch)
                # stored ones are of whole sequences
                stored = reference.name == "precomputed"
                return {"ref_logps": logps if stored else sum_over_ranks(logps, group)}
            hidden, head = pair
            return {
                "ref_hidden": hidden,
                "ref_weight": head.weight,
                "ref_bias": head.bias,
                "ref_lora": head.lora,
            }

    def _score(
        self,
        hidden: Tensor,
        head: Head,
        plan: TokenPlan,
        counts: BatchCounts,
        ref_kwargs: dict[str, Any],
        token_stats: bool,
        group: Any,
    ) -> FusedDPOOutput:
        args = self.args
        chosen_len, rejected_len = plan.pair_lengths(hidden.device)
        stats = PairStats(
            chosen_len=chosen_len,
            rejected_len=rejected_len,
            num_pairs=counts.num_pairs,
            num_chosen_tokens=counts.num_chosen_tokens,
        )
        return fused_linear_dpo(
            hidden,
            head.weight,
            plan.target,
            plan.cu_seqlens,
            seq_lens=plan.seq_lens,
            loss=self.loss,
            stats=stats,
            pair_weight=counts.pair_weight(plan.num_pairs),
            token_weight=None if args.ld_alpha is None else plan.ld_weight(args.ld_alpha),
            ignore_index=None,
            outputs=TOKEN_OUTPUTS if token_stats else (),
            backend=args.lm_head_backend,
            workspace=args.lm_head_workspace,
            filter_bound=args.lm_head_filter_bound,
            sequence_group=group,
            **head.kwargs(),
            **ref_kwargs,
        )


def _own_counts(plan: TokenPlan, group: Any, device: torch.device | None) -> BatchCounts:
    """Of a batch that is all there is; of cut rows each rank of ``group`` knows its own tokens."""
    if device is None:
        return BatchCounts(plan.num_pairs, plan.num_chosen_tokens)
    tokens = on_device([plan.num_chosen_tokens], device)
    return BatchCounts(plan.num_pairs, sum_over_ranks(tokens, group).squeeze(0))
