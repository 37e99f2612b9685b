"""TRL's own loss code: a real trl.DPOTrainer whose models give fixed per-token log-probs.

Legend: P pairs, T padded length; TRL's per-token tensors are ``[2P, T - 1]``, chosen rows first.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.losses import PairStats
from tests.tiny import tiny_model, tiny_preferences, tiny_tokenizer


class TokenBatch(NamedTuple):
    """Per-token values of one batch; ``log_probs`` is a leaf that requires a gradient."""

    completion_mask: Tensor  # [2P, T]
    log_probs: Tensor  # [2P, T - 1], 0 outside the completions
    ref_log_probs: Tensor  # [2P, T - 1]
    log_sum_sq_probs: Tensor  # [2P, T - 1]

    @property
    def mask(self) -> Tensor:
        return self.completion_mask[:, 1:].bool()


def random_batch(pairs: int, seed: int, dtype: torch.dtype) -> TokenBatch:
    """Ragged prompts and completions; the first chosen row has no prompt, so that its completion
    has one token more than is scored (TRL divides by the unshifted count)."""
    rng = torch.Generator().manual_seed(seed)
    width = 24
    mask = torch.zeros(2 * pairs, width, dtype=torch.long)
    for row in range(2 * pairs):
        prompt = int(torch.randint(1, 8, (), generator=rng)) if row else 0
        length = int(torch.randint(1, width - 8, (), generator=rng))
        mask[row, prompt : prompt + length] = 1
    scored = mask[:, 1:].bool()

    def values(scale: float) -> Tensor:
        raw = -scale * torch.rand(2 * pairs, width - 1, generator=rng, dtype=torch.float64)
        return torch.where(scored, raw, 0.0).to(dtype)

    noise = 0.3 * torch.randn(2 * pairs, width - 1, generator=rng, dtype=torch.float64)
    reference = values(3.0)
    policy = torch.where(scored, (reference + noise).clamp(max=-1e-3), 0.0).to(dtype)
    return TokenBatch(mask, policy.requires_grad_(), reference, values(1.0))


def make_trainer(output_dir: str, **config: Any) -> Any:
    """A trl.DPOTrainer around two tiny models."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=output_dir, bf16=False, use_cpu=True, report_to="none", **config)
    return DPOTrainer(
        model=tiny_model(seed=0),
        ref_model=tiny_model(seed=1),
        args=args,
        train_dataset=Dataset.from_list(tiny_preferences(4)),
        processing_class=tiny_tokenizer(),
    )


class TrlLoss(NamedTuple):
    loss: float
    gradient: Tensor  # [2P, T - 1], 0 outside the completions
    chosen_reward: float
    rejected_reward: float


def trl_loss(
    trainer: Any,
    batch: TokenBatch,
    loss_type: list[str],
    *,
    gradient: bool = True,
    **config: Any,
) -> TrlLoss:
    """The loss of `trainer`, reconfigured, on `batch`, with its gradient and logged rewards."""
    defaults = {
        "loss_weights": [1.0] * len(loss_type),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "ld_alpha": None,
        "discopop_tau": 0.05,
    }
    values = defaults | config
    trainer.loss_types = loss_type
    trainer.args.discopop_tau = values.pop("discopop_tau")
    for name, value in values.items():
        assert hasattr(trainer, name), f"TRL has no attribute {name} any more"
        setattr(trainer, name, value)
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    zeros = torch.zeros_like(log_probs)
    common = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "aux_loss": None}
    trainer.ref_model = lambda **_: SimpleNamespace(log_probs=batch.ref_log_probs, **common)
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = trainer._compute_loss(
        lambda **_: SimpleNamespace(
            log_probs=log_probs, log_sum_sq_probs=batch.log_sum_sq_probs, **common
        ),
        {
            "input_ids": torch.ones_like(batch.completion_mask),
            "attention_mask": torch.ones_like(batch.completion_mask),
            "completion_mask": batch.completion_mask,
        },
        False,
    )
    tokens = torch.autograd.grad(loss, log_probs)[0] if gradient else torch.zeros_like(log_probs)
    rewards = (trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected"))
    return TrlLoss(float(loss.detach()), tokens * batch.mask, *rewards)


def our_inputs(
    batch: TokenBatch, ld_alpha: float | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], PairStats]:
    """The four vectors and the stats of `batch`, by the definitions (LD-DPO, WPO eq. 2)."""
    pairs = batch.mask.shape[0] // 2
    weight = batch.mask.to(batch.log_probs.dtype)
    if ld_alpha is not None:
        position = batch.mask.cumsum(1)
        count = batch.mask.sum(1)
        shared = torch.minimum(count[:pairs], count[pairs:]).repeat(2)
        weight = weight * torch.where(position > shared[:, None], ld_alpha, 1.0)
    logps, ref_logps = ((x * weight).sum(1) for x in (batch.log_probs, batch.ref_log_probs))
    plain = batch.log_probs.sum(1)
    with torch.no_grad():
        tokens = batch.mask.sum(1).clamp(min=1)
        w = ((plain - batch.log_sum_sq_probs.sum(1)) / tokens).exp()
    lengths = batch.completion_mask.sum(1).to(batch.log_probs.dtype)
    stats = PairStats(
        chosen_len=lengths[:pairs],
        rejected_len=lengths[pairs:],
        chosen_nll_sum=-plain[:pairs],
        wpo_weight=w[:pairs] * w[pairs:],
        num_chosen_tokens=batch.mask[:pairs].sum(),
    )
    return (logps[:pairs], logps[pairs:], ref_logps[:pairs], ref_logps[pairs:]), stats
