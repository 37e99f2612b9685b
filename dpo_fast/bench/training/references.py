"""Training steps under each reference strategy: by hand, with TRL's trainer, with ours.

Legend: P pairs, S = 2P sequences.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.bench.case import Step
from dpo_fast.bench.training.contest import step_of
from dpo_fast.bench.training.naive import Batch, NaiveLoop
from dpo_fast.bench.training.stepper import models
from dpo_fast.bench.training.trainers import TrainerLoop, our_trainer, trl_trainer
from dpo_fast.bench.workload import ModelShape, Row

STRATEGIES = ("frozen", "adapter", "precomputed", "ema")
VARIANTS = ("naive", "TRL", "dpo_fast", "dpo_fast shared_prefix")
ALPHA = 0.01  # of the moving reference, which follows at every step here
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def lora() -> Any:
    """A LoRA config of the usual kind."""
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@torch.no_grad()
def fill_adapter(policy: nn.Module) -> None:
    """The same adapter weights in every variant, none of them 0."""
    g = torch.Generator().manual_seed(2)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            values = torch.empty(parameter.shape).normal_(std=0.02, generator=g)
            parameter.copy_(values.to(parameter))


def gold_loop(strategy: str, shape: ModelShape, device: str) -> NaiveLoop:
    """The loop by hand on float64 models."""
    return naive_loop(strategy, shape, device, torch.float64)


def naive_loop(strategy: str, shape: ModelShape, device: str, dtype: torch.dtype) -> NaiveLoop:
    """The strategy written by hand: full logits, padded rows."""
    policy, ref = models(shape, device, dtype)
    if strategy == "precomputed":
        return NaiveLoop(policy, columns)
    if strategy != "adapter":
        return NaiveLoop(policy, ref)
    from peft import get_peft_model

    peft: Any = get_peft_model(policy, lora())
    fill_adapter(peft)

    def base(batch: Batch) -> Tensor:
        with peft.disable_adapter():
            return loop.logps(peft, batch)

    loop = NaiveLoop(peft, base)
    return loop


def columns(batch: Batch) -> Tensor:
    """Log-probs that the rows came with, ``[S]``."""
    return torch.cat([batch[name] for name in REF_COLUMNS])


@torch.no_grad()
def with_reference(rows: list[Row], shape: ModelShape, device: str) -> list[Any]:
    """The rows with the reference's log-probs, from float64."""
    _, ref = models(shape, device, torch.float64)
    loop = NaiveLoop(ref, ref)
    out = []
    for row in rows:
        batch = {k: v.to(device) for k, v in loop.collator([row]).items()}
        values = loop.logps(ref, batch).tolist()
        out.append({**row, **dict(zip(REF_COLUMNS, values, strict=True))})
    return out


def make_step(
    strategy: str, variant: str, shape: ModelShape, rows: list[Any], device: str, dtype: torch.dtype
) -> Step:
    """A whole training step, the reference's update included where it moves.

    Raises:
        LeftOut: TRL is not installed.
    """
    if variant == "naive":
        loop = naive_loop(strategy, shape, device, dtype)
        follow = _follow_by_hand(loop, shape, device, dtype) if strategy == "ema" else None
        return _with_update(step_of(loop, rows), follow)
    policy, ref = models(shape, device, dtype)
    build = trl_trainer if variant == "TRL" else our_trainer
    options = _trl_options(strategy) if variant == "TRL" else _our_options(strategy, variant)
    given = ref if strategy in ("frozen", "ema") else None
    trainer = build(policy, given, device, **options)
    if strategy == "adapter":
        fill_adapter(trainer.model)
    follow = _follow_of(trainer, variant) if strategy == "ema" else None
    return _with_update(step_of(TrainerLoop(trainer), rows), follow)


def _our_options(strategy: str, variant: str) -> dict[str, Any]:
    layout = "padded" if variant == "dpo_fast" else variant.removeprefix("dpo_fast ")
    options: dict[str, Any] = {"reference": strategy, "batch_layout": layout}
    if strategy == "adapter":
        options["peft_config"] = lora()
    if strategy == "precomputed":
        options["ref_cache_dir"] = tempfile.mkdtemp(prefix="dpo-fast-bench-")
    if strategy == "ema":
        options |= {"ref_model_mixup_alpha": ALPHA, "ref_model_sync_steps": 1}
    return options


def _trl_options(strategy: str) -> dict[str, Any]:
    return {
        "frozen": {},
        "adapter": {"peft_config": lora()},
        "precomputed": {"precompute_ref_log_probs": True},
        "ema": {"sync_ref_model": True, "ref_model_mixup_alpha": ALPHA, "ref_model_sync_steps": 1},
    }[strategy]


def _follow_of(trainer: Any, variant: str) -> Callable[[], None]:
    """The update that the trainer's own callback makes."""
    if variant != "TRL":
        update: Callable[[], None] = trainer.reference.update
        return update
    from trl.trainer.callbacks import SyncRefModelCallback

    policy, ref = trainer.accelerator.unwrap_model(trainer.model), trainer.ref_model
    return lambda: SyncRefModelCallback.sync_target_model(policy, ref, ALPHA)


def _follow_by_hand(
    loop: NaiveLoop, shape: ModelShape, device: str, dtype: torch.dtype
) -> Callable[[], None]:
    _, ref = models(shape, device, dtype)
    frozen = ref.eval().requires_grad_(False)
    loop.reference = lambda batch: loop.logps(frozen, batch)

    def update() -> None:
        pairs = zip(frozen.parameters(), loop.policy.parameters(), strict=True)
        for mine, live in pairs:
            mine.mul_(1.0 - ALPHA).add_(live, alpha=ALPHA)

    return torch.no_grad()(update)


def _with_update(step: Step, follow: Callable[[], None] | None) -> Step:
    if follow is None:
        return step

    def both() -> Any:
        out = step()
        follow()
        return out

    return both
