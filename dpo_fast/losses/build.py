"""``build_loss``: names, weights and options of the configuration -> one callable, checked once."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_fast.losses.checks import check_divergence, check_numbers, check_smoothing, check_weighting
from dpo_fast.losses.combine import PreferenceLoss, Term, UserLoss
from dpo_fast.losses.registry import LOSSES
from dpo_fast.losses.traits import traits_of

LossType = str | Callable[..., Any]


def build_loss(
    loss_type: LossType | Sequence[LossType] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    use_weighting: bool = False,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    kto_desirable_weight: float = 1.0,
    kto_undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """One loss, or a weighted sum of several, from TRL's options and ours.

    Args:
        loss_type: a name of :data:`LOSSES`, a callable, or a list of both. A callable gets the four
            ``[P]`` vectors, and ``stats`` if it takes that keyword; it returns the losses ``[P]``,
            or the triple with rewards. It is taken for coupled (all pairs at once) and for needing
            a reference, unless it carries ``separable = True``, ``needs_reference = False``;
            ``needs_nll``, ``needs_lengths``, ``needs_wpo`` ask for those fields of ``stats``.
        loss_weights: one a loss, not normalised; None: all 1.
        beta: strength of the tie to the reference: tau of IPO, lambda of ORPO.
        label_smoothing: read by cdpo, robust, exo_pair, aot, aot_unpaired.
        f_divergence_type, f_alpha_divergence_coef: a divergence other than reverse_kl is allowed
            where rewards enter only as a difference of the two answers (sigmoid, sigmoid_norm,
            hinge, ipo, exo_pair, robust, discopop, cdpo) and with sft, which ignores it.
        discopop_tau: temperature of discopop.
        use_weighting: WPO. Every pair's loss is multiplied by ``stats.wpo_weight``; of orpo and cpo
            the preference term only; sft is left as it is (its docstring says why).
        simpo_gamma: target margin of simpo.
        cpo_alpha: weight of the likelihood term of cpo.
        kto_desirable_weight, kto_undesirable_weight: of kto_pair.

    Returns:
        A :class:`PreferenceLoss`.

    Raises:
        ValueError: unknown name; no loss; another number of weights than of losses; an option out
            of its range or not finite; a divergence that a loss has no form for.
        TypeError: a loss that is neither name nor callable, or is a PreferenceLoss already; an
            option that is no number.
        NotImplementedError: ``use_weighting`` with aot or aot_unpaired, whose losses belong to
            quantiles, not to pairs.
    """
    options = {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": f_alpha_divergence_coef,
        "discopop_tau": discopop_tau,
        "simpo_gamma": simpo_gamma,
        "cpo_alpha": cpo_alpha,
        "kto_desirable_weight": kto_desirable_weight,
        "kto_undesirable_weight": kto_undesirable_weight,
    }
    check_numbers(options)
    if isinstance(loss_type, str) or callable(loss_type):
        loss_type = [loss_type]
    given = list(loss_type) if isinstance(loss_type, Sequence) else [loss_type]
    weights = _weights(loss_weights, len(given))
    terms = tuple(_term(one, weight, options) for one, weight in zip(given, weights, strict=True))
    check_divergence(terms, f_divergence_type)
    check_weighting(terms, use_weighting)
    check_smoothing(terms, label_smoothing)
    return PreferenceLoss(terms, use_weighting=use_weighting, beta=beta)


def _weights(loss_weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError(f"loss_type is empty: give at least one of {', '.join(LOSSES)}")
    if not loss_weights:  # None, or an empty list as in TRL
        return [1.0] * count
    weights = [float(w) for w in loss_weights]
    if len(weights) != count:
        raise ValueError(
            f"loss_weights has {len(weights)} entries and loss_type {count}: give one weight a loss"
        )
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"loss_weights={weights} must be finite numbers")
    return weights


def _term(loss: LossType, weight: float, options: Mapping[str, Any]) -> Term:
    if isinstance(loss, str):
        if loss not in LOSSES:
            close = difflib.get_close_matches(loss, LOSSES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Unknown loss type: {loss!r}.{hint} Known: {', '.join(LOSSES)}")
        return _named(loss, weight, options)
    if isinstance(loss, PreferenceLoss):
        raise TypeError(
            f"loss_type holds {loss!r}, which is built already: its options would be ignored. Call "
            "it as it is, or give all names and weights to one build_loss."
        )
    if not callable(loss):
        raise TypeError(
            "loss_type must be a name, a callable, or a list of them, got "
            f"{type(loss).__name__} {loss!r}"
        )
    for name, fn in LOSSES.items():
        if loss is fn:
            return _named(name, weight, options)
    function = getattr(loss, "func", loss)  # of a functools.partial
    name = getattr(function, "__name__", type(loss).__name__)
    return Term(name, weight, UserLoss(loss, name, options["beta"]), {}, traits_of(loss))


def _named(name: str, weight: float, options: Mapping[str, Any]) -> Term:
    fn = LOSSES[name]
    own = {k: v for k, v in options.items() if k in inspect.signature(fn).parameters}
    return Term(name, weight, fn, own, traits_of(fn))
