"""Which reference a run gets: what was asked for, what the flags name, else the cheapest.

One table of rules for every combination of arguments; what cannot work raises here, before any
work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dpo_fast.models import is_peft_model
from dpo_fast.reference.protocol import REFERENCE_NAMES

Peft = Literal["no", "new", "continued"]


@dataclass(frozen=True)
class Situation:
    """All that the choice depends on.

    Attributes:
        asked: ``args.reference``.
        precompute_flag, sync_flag: TRL's ``precompute_ref_log_probs`` and ``sync_ref_model``.
        ref_model: whether one was given.
        peft: whether the policy has an adapter, made for this run ("new") or going on.
        streamed: name of a dataset whose rows cannot be counted, or None.
        needs_reference: whether the loss does.
        trained: whether any parameter of the policy requires a gradient.
        offload: ``args.ref_offload``.
    """

    asked: str = "auto"
    precompute_flag: bool = False
    sync_flag: bool = False
    ref_model: bool = False
    peft: Peft = "no"
    streamed: str | None = None
    needs_reference: bool = True
    trained: bool = True
    offload: bool = False


@dataclass(frozen=True)
class ReferencePlan:
    """``name``: a strategy, or ``"none"``; ``reason``: why, for the log."""

    name: str
    reason: str
    situation: Situation

    @property
    def fresh(self) -> bool:
        """Whether the policy's adapter was made for this run."""
        return self.situation.peft == "new"

    def line(self) -> str:
        """One line for the log."""
        return f"reference={self.name!r}: {self.reason}."


def choose_reference(
    args: Any,
    *,
    model: nn.Module,
    ref_model: nn.Module | None = None,
    adapter_is_new: bool = False,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    needs_reference: bool = True,
) -> ReferencePlan:
    """The strategy for a trainer's arguments.

    Args:
        args: with the fields ``reference``, ``precompute_ref_log_probs``, ``sync_ref_model`` and
            ``ref_offload``.
        model: the policy; a ``PeftModel`` where it has an adapter.
        ref_model: as given.
        adapter_is_new: the adapter was made for this run.
        train_dataset, eval_dataset: datasets, or a mapping of them.
        needs_reference: False for losses without one; ``"auto"`` then gives none.

    Raises:
        ValueError: the combination means nothing; with the remedy.
    """
    if ref_model is not None and ref_model is model:
        raise ValueError(
            "model and ref_model are the same object, so the reference would move with the "
            "policy: omit ref_model, and a copy is kept for you."
        )
    peft: Peft = "no"
    if is_peft_model(model):
        peft = "new" if adapter_is_new else "continued"
    return decide(
        Situation(
            asked=args.reference,
            precompute_flag=args.precompute_ref_log_probs,
            sync_flag=args.sync_ref_model,
            ref_model=ref_model is not None,
            peft=peft,
            streamed=_streamed(train_dataset, "train") or _streamed(eval_dataset, "eval"),
            needs_reference=needs_reference,
            trained=any(p.requires_grad for p in model.parameters()),
            offload=getattr(args, "ref_offload", False),
        )
    )


def decide(situation: Situation) -> ReferencePlan:
    """The rules. Raises ValueError as :func:`choose_reference`."""
    name, reason = _named(situation)
    check = {"adapter": _check_adapter, "precomputed": _check_precomputed, "ema": _check_ema}.get(
        name
    )
    if check is not None:
        check(situation)
    plan = ReferencePlan(name, reason, situation)
    if situation.offload and name != "frozen":
        raise ValueError(
            "ref_offload=True keeps the layers of a frozen second model in host memory, and this "
            f"run's {plan.line()} Drop ref_offload, or set reference='frozen'."
        )
    return plan


def _named(s: Situation) -> tuple[str, str]:
    if s.asked not in ("auto", *REFERENCE_NAMES):
        raise ValueError(
            f"reference={s.asked!r} is unknown; use 'auto' or one of "
            f"{', '.join(map(repr, REFERENCE_NAMES))}."
        )
    if s.precompute_flag and s.sync_flag:
        raise ValueError(
            "precompute_ref_log_probs=True and sync_ref_model=True exclude each other: log-probs "
            "that are computed once cannot follow a reference that moves. Drop one."
        )
    flags = {
        "precompute_ref_log_probs": (s.precompute_flag, "precomputed"),
        "sync_ref_model": (s.sync_flag, "ema"),
    }
    for flag, (is_set, meant) in flags.items():
        if is_set and s.asked not in ("auto", meant):
            raise ValueError(
                f"reference={s.asked!r} and {flag}=True name two references (the flag means "
                f"{meant!r}): drop {flag}, or set reference={meant!r}."
            )
        if is_set and s.asked == "auto":
            return meant, f"{flag}=True"
    if s.asked != "auto":
        return s.asked, "asked for"
    if s.ref_model:
        return "frozen", "a ref_model was given"
    if not s.needs_reference:
        return "none", "the loss needs none"
    if s.peft == "new":
        return (
            "adapter",
            "the policy is a new adapter, and its base is the reference: no second model",
        )
    if s.peft == "continued":
        return "adapter", "the policy goes on training an adapter, of which a frozen copy is kept"
    return "frozen", "full fine-tuning, so a copy of the initial policy is kept"


def _check_adapter(s: Situation) -> None:
    if s.ref_model:
        raise ValueError(
            "reference='adapter' takes the reference from the policy's own base, and a ref_model "
            "was given, too: drop ref_model, or use reference='frozen' or 'precomputed' to use "
            "it."
        )
    if s.peft == "no":
        raise ValueError(
            "reference='adapter' needs an adapter, and the policy has none: pass peft_config (or a "
            "PeftModel), or use reference='frozen'."
        )


def _check_precomputed(s: Situation) -> None:
    if s.streamed is not None:
        raise ValueError(
            "reference='precomputed' needs datasets whose rows can be counted, and "
            f"{s.streamed!r} is a stream (IterableDataset): load it without streaming, or use "
            "reference='frozen' (or 'adapter' with PEFT)."
        )


def _check_ema(s: Situation) -> None:
    if s.peft != "no" and s.ref_model:
        raise ValueError(
            "reference='ema' with PEFT averages the adapter's weights, and a ref_model was "
            "given, too: drop ref_model, or use reference='frozen' to keep it as it is."
        )
    if not s.trained:
        raise ValueError(
            "reference='ema' follows the policy, but no parameter of the policy is trained, so "
            "nothing would ever change: unfreeze some (PeftModel.from_pretrained(..., "
            "is_trainable=True))."
        )


def _streamed(dataset: Any, name: str) -> str | None:
    """Name of the first dataset without a length, or None."""
    if isinstance(dataset, Mapping):
        for key, member in dataset.items():
            found = _streamed(member, str(key))
            if found is not None:
                return found
        return None
    return name if dataset is not None and not hasattr(dataset, "__len__") else None
