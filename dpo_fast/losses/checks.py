"""Which options go together: the rules of TRL 1.16 and of the papers, with the remedy."""

import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from dpo_fast.losses.combine import Term
from dpo_fast.losses.f_divergence import F_DIVERGENCES
from dpo_fast.losses.registry import LOSSES

logger = logging.getLogger("dpo_fast")

_POSITIVE = ("beta", "discopop_tau")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Numbers are finite; ``beta`` and ``discopop_tau`` are positive."""
    for name, value in options.items():
        if name == "f_divergence_type":
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
        if name in _POSITIVE and value <= 0:
            raise ValueError(f"{name}={value} must be positive")


def check_divergence(terms: Sequence[Term], f_divergence_type: str) -> None:
    """A divergence other than reverse_kl, only where its prompt-dependent term cancels."""
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(
            f"f_divergence_type={f_divergence_type!r} must be one of {', '.join(F_DIVERGENCES)}"
        )
    refused = [term.name for term in terms if not term.traits.f_divergence]
    if f_divergence_type != "reverse_kl" and refused:
        allowed = [name for name, fn in LOSSES.items() if getattr(fn, "f_divergence", False)]
        raise ValueError(
            f"f_divergence_type={f_divergence_type!r} has no form for {', '.join(refused)}; it is "
            f"supported for {', '.join(allowed)}. Use f_divergence_type='reverse_kl' here."
        )


def check_weighting(terms: Sequence[Term], use_weighting: bool) -> None:
    """WPO needs losses that belong to pairs."""
    if not use_weighting:
        return
    refused = [term.name for term in terms if term.traits.wpo == "unsupported"]
    if refused:
        raise NotImplementedError(
            f"use_weighting=True is not implemented for {', '.join(refused)}: the losses belong to "
            "sorted quantiles, so a pair's weight has no loss to multiply. Use another loss, or "
            "use_weighting=False."
        )
    if all(term.traits.wpo == "none" for term in terms):
        logger.warning("use_weighting=True has no effect on %s.", _names(terms))


def check_smoothing(terms: Sequence[Term], label_smoothing: float) -> None:
    """The range of ``label_smoothing`` that each loss is defined on."""
    e, names = label_smoothing, [term.name for term in terms]
    if "exo_pair" in names and not 0.0 < e < 1.0:
        raise ValueError(
            f"label_smoothing={e} must lie in (0, 1) for the 'exo_pair' loss, which takes its "
            "logarithm; the paper recommends 1e-3"
        )
    if "robust" in names:
        _check_robust(e)
    if "cdpo" in names and not 0.0 <= e < 0.5:
        raise ValueError(
            f"label_smoothing={e} must lie in [0, 0.5) for the 'cdpo' loss: it is the share of "
            "flipped labels"
        )
    if "cdpo" in names and e == 0.0:
        logger.warning("label_smoothing=0: the 'cdpo' loss is then the 'sigmoid' loss.")
    if {"aot", "aot_unpaired"} & set(names) and not 0.0 <= e <= 1.0:
        raise ValueError(f"label_smoothing={e} must lie in [0, 1] for 'aot' and 'aot_unpaired'")
    if e != 0.0 and not any("label_smoothing" in term.options for term in terms):
        logger.warning(
            "label_smoothing=%s has no effect on %s, as in TRL; conservative DPO is "
            "loss_type='cdpo'.",
            e,
            _names(terms),
        )


def _check_robust(label_smoothing: float) -> None:
    if label_smoothing == 0.5:
        raise ValueError(
            "label_smoothing=0.5 makes the 'robust' loss divide by 1 - 2 * 0.5 = 0: labels flipped "
            "half of the time carry no preference. Give a value in [0, 0.5)."
        )
    if not 0.0 <= label_smoothing < 0.5:
        logger.warning(
            "label_smoothing=%s should lie in [0.0, 0.5) for the 'robust' loss: it is the share of "
            "flipped labels.",
            label_smoothing,
        )


def _names(terms: Sequence[Term]) -> str:
    return ", ".join(term.name for term in terms)
