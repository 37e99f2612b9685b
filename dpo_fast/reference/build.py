"""A plan and a trainer's arguments to a reference that is ready to be asked."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dpo_fast.ranks import all_ranks
from dpo_fast.reference.adapter import AdapterReference
from dpo_fast.reference.choose import ReferencePlan
from dpo_fast.reference.ema import EmaReference
from dpo_fast.reference.estimate import count_tokens, suggestion
from dpo_fast.reference.frozen import FrozenReference
from dpo_fast.reference.precompute import Precompute
from dpo_fast.reference.precomputed import PrecomputedReference
from dpo_fast.reference.protocol import Reference
from dpo_fast.reference.scored import Scoring
from dpo_fast.reference.sources import (
    AdapterSource,
    ModelSource,
    PolicySource,
    ReferenceSource,
    move_model,
)

logger = logging.getLogger("dpo_fast")

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


def scoring_of(args: Any) -> Scoring:
    """How the reference is run: in the policy's precision, with its head options and LD weight."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return Scoring(
        ld_alpha=args.ld_alpha,
        autocast_dtype=dtype,
        backend=getattr(args, "lm_head_backend", "auto"),
        workspace=getattr(args, "lm_head_workspace", None),
    )


def build_reference(
    plan: ReferencePlan,
    args: Any,
    *,
    policy: nn.Module,
    ref_model: nn.Module | None = None,
    collator: Collator,
    train_dataset: Any = None,
    log: bool = True,
) -> Reference | None:
    """Make the reference of ``plan``; None where the loss needs none.

    Called when the policy is complete (dropout, dtypes, adapters), on its device, and not yet
    sharded. A precomputed reference then wants ``attach(dataset, name)`` for every dataset and
    ``release()``.

    Args:
        args: a :class:`dpo_fast.DPOConfig`.
        policy: without the wrappers of DDP.
        ref_model: as given to the trainer.
        collator: planned, with the run's truncation.
        train_dataset: tokenised, for the suggestion in the log; None or a stream: without one.
        log: on the main process.

    Raises:
        ValueError: as the strategies.
    """
    if plan.name == "none":
        _say(log, plan.line())
        return None
    scoring = scoring_of(args)
    device = next(policy.parameters()).device
    reference: Reference
    if plan.name == "precomputed":
        if device.type == "cpu" and getattr(args, "device", None) is not None:
            device = args.device  # the policy of FSDP2 and DeepSpeed waits on the host
        source = _source(plan, args, policy, ref_model, scoring)
        how = Precompute(collator, _batch_size(args), device, all_ranks())
        reference = PrecomputedReference(source, how, scoring, args.ref_cache_dir)
    elif plan.name == "ema":
        base = _standing(plan, policy, ref_model, scoring, device, fresh=False)
        reference = EmaReference(
            base,
            policy,
            alpha=args.ref_model_mixup_alpha,
            every=args.ref_model_sync_steps,
            rounding=getattr(args, "ref_ema_rounding", "auto"),
            seed=args.seed,
        )
    else:
        offload = getattr(args, "ref_offload", False)
        reference = _standing(
            plan, policy, ref_model, scoring, device, fresh=plan.fresh, offload=offload
        )
    if str(getattr(args, "save_strategy", "no")).rpartition(".")[2].lower() != "no":
        reference.fingerprint()  # for checkpoints; sharded weights could not be identified any more
    _say(log, f"{plan.line()} {reference.describe()}.")
    if log and plan.name in ("frozen", "adapter") and hasattr(train_dataset, "__len__"):
        _say(log, _suggestion(reference, args, policy, train_dataset, scoring, device))
    return reference


def _standing(
    plan: ReferencePlan,
    policy: nn.Module,
    ref_model: nn.Module | None,
    scoring: Scoring,
    device: torch.device,
    *,
    fresh: bool,
    offload: bool = False,
) -> FrozenReference | AdapterReference:
    """A reference that stays on the device; one that is to be offloaded never goes there."""
    if offload:
        device = torch.device("cpu")
    if ref_model is not None:
        return FrozenReference(move_model(ref_model, device), policy, scoring)
    if plan.name == "adapter" or (plan.name == "ema" and plan.situation.peft != "no"):
        return AdapterReference(policy, fresh=fresh, scoring=scoring)
    return FrozenReference.copy_of(policy, device=device if offload else None, scoring=scoring)


def _source(
    plan: ReferencePlan,
    args: Any,
    policy: nn.Module,
    ref_model: nn.Module | None,
    scoring: Scoring,
) -> ReferenceSource:
    if ref_model is not None:
        return ModelSource(FrozenReference(ref_model, policy, scoring))
    if plan.situation.peft != "no":
        return AdapterSource(AdapterReference(policy, fresh=plan.fresh, scoring=scoring))
    return PolicySource(policy, scoring, getattr(args, "ref_keep", "auto"))


def _batch_size(args: Any) -> int:
    return args.precompute_ref_batch_size or args.per_device_train_batch_size


def _suggestion(
    reference: Reference,
    args: Any,
    policy: nn.Module,
    dataset: Any,
    scoring: Scoring,
    device: torch.device,
) -> str:
    dtype = scoring.autocast_dtype or next(policy.parameters()).dtype
    tokens = count_tokens(dataset, args.max_length)
    epochs = float(args.num_train_epochs)
    if args.max_steps > 0:
        pairs = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        epochs = pairs * args.world_size / max(len(dataset), 1)
    return suggestion(
        second_model=reference.module,
        model=policy,
        tokens=tokens // max(args.world_size, 1),
        epochs=epochs,
        how=(device, dtype),
    )


def _say(log: bool, text: str) -> None:
    if log:
        logger.info("%s", text)
