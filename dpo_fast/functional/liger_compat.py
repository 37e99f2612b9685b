"""``FusedLinearDPOLoss``: the fused loss behind the call signature that Liger's users have.

Legend: P pairs, 2P rows of the batch (all chosen first), T padded length, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.functional import host
from dpo_fast.functional.fused import fused_linear_dpo
from dpo_fast.functional.pair_stats import PairGroup, chosen_nll_sum

Details = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class FusedLinearDPOLoss(nn.Module):
    """DPO's loss from hidden states and LM head, in place of ``LigerFusedLinearDPOLoss``.

    Same positional arguments, same call, same return tuple; what differs:

    - only rows with a target are computed on the CPU, and on CUDA with ``compact=True``;
    - nothing is computed for a frozen weight, or in evaluation;
    - ``ref_chosen_logps``, ``ref_rejected_logps`` take known reference log-probs;
    - any loss of ``dpo_fast.losses`` by name, any callable, any upstream gradient;
    - an empty answer has log-prob 0, also averaged.

    Args:
        ignore_index: target of positions that do not count.
        beta: strength of the tie to the reference.
        alpha: weight of the chosen answers' mean NLL, with ``compute_nll_loss``.
        compute_nll_loss: add that term.
        compiled: accepted and not used: nothing is compiled.
        use_ref_model: False means a reference of log-prob 0.
        average_log_prob: mean instead of sum over an answer's tokens, of policy and reference.
        chunk_size: accepted and not used: groups follow from ``workspace``.
        loss_type, label_smoothing, discopop_tau: as ``dpo_fast.losses.build_loss``.
        compact: on CUDA, find the positions that count with one device sync, instead of computing
            all of them. Without effect on the CPU.
        backend, workspace: as :func:`fused_linear_dpo`.

    Raises:
        ValueError: unknown loss, options out of range; inputs as :func:`fused_linear_dpo`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: Any = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        compact: bool = False,
        backend: str = "auto",
        workspace: int | None = None,
    ) -> None:
        # The one upward import of this layer: the class is a convenience over both packages.
        from dpo_fast.losses import PairStats, build_loss

        super().__init__()
        self.ignore_index = ignore_index
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.compact = compact
        self.backend = backend
        self.workspace = workspace
        names = [loss_type, "sft"] if compute_nll_loss else [loss_type]
        self.preference_loss = build_loss(
            names,
            [1.0, alpha][: len(names)],
            beta=beta,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
        )
        self.compute_nll_loss = compute_nll_loss
        self._stats_class = PairStats

    def forward(
        self,
        lin_weight: Tensor,  # [V, H]
        _input: Tensor,  # [2P, T, H], shifted: _input[:, t] predicts target[:, t]
        target: Tensor,  # [2P, T] int64
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [2P, T, H]
        ref_weight: Tensor | None = None,  # [V, H]; None: lin_weight
        ref_bias: Tensor | None = None,  # [V]
        *,
        ref_chosen_logps: Tensor | None = None,  # [P]
        ref_rejected_logps: Tensor | None = None,  # [P]
    ) -> tuple[Tensor, Details]:
        """``(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean,
        nll_loss, chosen_rewards, rejected_rewards))``; only ``loss`` carries a gradient.

        The logits' means are over all positions, counted or not, and over the vocabulary.
        """
        self._check(_input, target, ref_input)
        rows, length = target.shape
        counted = target != self.ignore_index
        lengths = counted.sum(1)
        borders = torch.arange(rows + 1, device=target.device) * length
        hidden, ref_hidden, labels = _input.flatten(0, 1), ref_input, target.flatten()
        if ref_hidden is not None:
            ref_hidden = ref_hidden.flatten(0, 1)
        if self.compact and not host.on_host(target):
            keep = counted.flatten().nonzero().squeeze(1)  # waits for the device, as declared
            hidden, labels = hidden[keep], labels[keep]
            ref_hidden = None if ref_hidden is None else ref_hidden[keep]
            borders = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        token_weight = None
        if self.average_log_prob:
            weights = lengths.clamp_min(1).reciprocal()
            token_weight = weights.repeat_interleave(borders.diff(), output_size=len(labels))
        nll = _NllSum(self._stats_class, lengths.float(), self.compute_nll_loss)
        output = fused_linear_dpo(
            hidden,
            lin_weight,
            labels,
            borders,
            ref_hidden=ref_hidden if self.use_ref_model else None,
            ref_weight=ref_weight if self.use_ref_model and ref_hidden is not None else None,
            ref_bias=ref_bias,
            ref_logps=self._known(ref_chosen_logps, ref_rejected_logps, rows, _input),
            loss=self.preference_loss,
            stats=nll,
            token_weight=token_weight,
            bias=bias,
            ignore_index=self.ignore_index,
            backend=self.backend,
            workspace=self.workspace,
        )
        half = rows // 2
        return output.loss, (
            output.logps[:half],
            output.logps[half:],
            _logits_mean(_input[:half], lin_weight, bias),
            _logits_mean(_input[half:], lin_weight, bias),
            nll.mean(),
            output.chosen_rewards,
            output.rejected_rewards,
        )

    @staticmethod
    def _check(_input: Tensor, target: Tensor, ref_input: Tensor | None) -> None:
        shape = list(_input.shape)
        if _input.dim() != 3 or list(target.shape) != shape[:2] or len(target) % 2:
            raise ValueError(
                f"_input is {shape} and target {list(target.shape)}; they must be [2P, T, H] and "
                "[2P, T], chosen rows first, shifted by one already"
            )
        if ref_input is not None and ref_input.shape[:2] != _input.shape[:2]:
            raise ValueError(
                f"ref_input is {list(ref_input.shape)} and _input {shape}; the first two sizes "
                "must agree: both models score the same tokens"
            )

    def _known(
        self, chosen: Tensor | None, rejected: Tensor | None, rows: int, like: Tensor
    ) -> Tensor | None:
        """Reference log-probs that need no model, ``[2P]``."""
        if (chosen is None) != (rejected is None):
            raise ValueError("pass both of ref_chosen_logps and ref_rejected_logps, or neither")
        if chosen is not None and rejected is not None:
            if not self.use_ref_model:
                raise ValueError("use_ref_model=False and reference log-probs are in conflict")
            return torch.cat((chosen, rejected))
        if self.use_ref_model:
            return None
        return torch.zeros(rows, device=like.device)


class _NllSum:
    """Statistics for a group of pairs; sums up the chosen answers' NLL on the way."""

    def __init__(self, stats_class: Any, lengths: Tensor, wanted: bool) -> None:
        self.stats_class, self.lengths, self.wanted = stats_class, lengths, wanted
        self.pairs = lengths.shape[0] // 2
        self.total = lengths.new_zeros(())
        self.tokens = lengths[: self.pairs].sum().clamp_min(1)

    def __call__(self, group: PairGroup) -> Any:
        nll = chosen_nll_sum(group) if self.wanted else None
        if nll is not None:
            self.total = self.total + nll.detach().sum()
        return self.stats_class(
            self.lengths[: self.pairs][group.pairs],
            self.lengths[self.pairs :][group.pairs],
            chosen_nll_sum=nll,
            num_pairs=self.pairs,
            num_chosen_tokens=self.tokens,
        )

    def mean(self) -> Tensor:
        """NLL a chosen token; 0 where it was not asked for."""
        return self.total / self.tokens


@torch.no_grad()
def _logits_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean of ``hidden @ weight.T + bias`` over everything: linear, so no logits are needed."""
    state = hidden.flatten(0, -2).mean(0, dtype=torch.float32)
    value = state @ weight.mean(0, dtype=torch.float32)
    return value if bias is None else value + bias.mean(dtype=torch.float32)
