"""A weighted sum of losses behind one signature, and the adapter of a user's own callable.

Legend: P pairs.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_fast.losses.output import LossOutput, wide, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import Traits


@dataclass(frozen=True)
class Term:
    """One loss of a sum: its name, its weight, and the function with its own options bound."""

    name: str
    weight: float
    fn: Callable[..., LossOutput]
    options: Mapping[str, Any]
    traits: Traits

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.weight:g} * {self.name}({options})"


class UserLoss:
    """A callable of the four ``[P]`` vectors, with or without ``stats``, as a loss.

    It returns the losses ``[P]``, or ``(losses, chosen_rewards, rejected_rewards)``. Rewards that
    it does not return are ``beta * log-ratio``, or ``beta * logp`` without a reference.
    """

    def __init__(self, fn: Callable[..., Any], name: str, beta: float) -> None:
        self.fn, self.name, self.beta = fn, name, beta
        self.takes_stats = _takes_stats(fn)

    def __call__(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None,
        ref_rejected_logps: Tensor | None,
        *,
        stats: PairStats | None = None,
    ) -> LossOutput:
        vectors = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        answer = self.fn(*vectors, stats=stats) if self.takes_stats else self.fn(*vectors)
        parts = answer if isinstance(answer, tuple) else (answer,)
        shapes = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in parts]
        if len(parts) not in (1, 3) or any(shape != list(chosen_logps.shape) for shape in shapes):
            raise ValueError(
                f"the loss {self.name!r} returned {shapes}; it must return the losses, or (losses, "
                f"chosen_rewards, rejected_rewards), each a tensor {list(chosen_logps.shape)}: one "
                "value a pair, not their mean"
            )
        if len(parts) == 3:
            return LossOutput(wide(parts[0]), wide(parts[1].detach()), wide(parts[2].detach()))
        chosen, rejected = wide(chosen_logps), wide(rejected_logps)
        if ref_chosen_logps is not None and ref_rejected_logps is not None:
            chosen, rejected = chosen - wide(ref_chosen_logps), rejected - wide(ref_rejected_logps)
        return with_rewards(wide(parts[0]), self.beta, chosen, rejected)


def _takes_stats(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters
    except ValueError:  # builtins without a signature: the four vectors only
        return False
    return "stats" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


class PreferenceLoss:
    """``sum_k weight_k * loss_k`` over the four ``[P]`` vectors; made by ``build_loss``.

    Called like any loss of this package, it returns a :class:`LossOutput`. The rewards are those of
    the first loss of the list that is not ``sft``.

    Attributes:
        names: of the losses, in order.
        separable: ``losses[p]`` depends on pair p (and on global counts) only, so that groups of
            pairs may be evaluated one after the other.
        needs_reference: reference log-probs are read. True for a sole ``sft``, whose rewards are
            logged against the reference, as in TRL.
        needs_lengths, needs_nll, needs_wpo: the fields of :class:`PairStats` that are read.
        beta: the option of that name.
    """

    def __init__(self, terms: tuple[Term, ...], *, use_weighting: bool, beta: float) -> None:
        traits = [term.traits for term in terms]
        self.terms = terms
        self.beta = beta
        self.names = tuple(term.name for term in terms)
        self.separable = all(t.separable for t in traits)
        self.needs_reference = any(t.needs_reference for t in traits) or not any(
            t.defines_rewards for t in traits
        )
        self.needs_lengths = any(t.needs_lengths for t in traits)
        self.needs_nll = any(t.needs_nll for t in traits)
        self.use_weighting = use_weighting
        weighted = use_weighting and any(t.wpo != "none" for t in traits)
        self.needs_wpo = weighted or any(t.needs_wpo for t in traits)
        self._rewards_of = next((i for i, t in enumerate(traits) if t.defines_rewards), 0)

    def __call__(
        self,
        chosen_logps: Tensor,  # [P]
        rejected_logps: Tensor,  # [P]
        ref_chosen_logps: Tensor | None = None,  # [P]
        ref_rejected_logps: Tensor | None = None,  # [P]
        *,
        stats: PairStats | None = None,
    ) -> LossOutput:
        vectors = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        outputs = [self._evaluate(term, vectors, stats) for term in self.terms]
        total = outputs[0].losses * self.terms[0].weight
        for term, output in zip(self.terms[1:], outputs[1:], strict=True):
            total = total + output.losses * term.weight
        _, chosen_rewards, rejected_rewards = outputs[self._rewards_of]
        return LossOutput(total, chosen_rewards, rejected_rewards)

    def _evaluate(
        self, term: Term, vectors: tuple[Tensor | None, ...], stats: PairStats | None
    ) -> LossOutput:
        if not self.use_weighting or term.traits.wpo == "none":
            return term.fn(*vectors, stats=stats, **term.options)
        if stats is None or stats.wpo_weight is None:
            raise ValueError(
                "use_weighting=True: pass stats=PairStats(..., wpo_weight=w(chosen) * w(rejected))"
            )
        weight = stats.wpo_weight.detach()
        if term.traits.wpo == "preference_term":
            return term.fn(*vectors, stats=stats, preference_weight=weight, **term.options)
        output = term.fn(*vectors, stats=stats, **term.options)
        return output._replace(losses=output.losses * weight)

    def __repr__(self) -> str:
        weighting = ", use_weighting=True" if self.use_weighting else ""
        return f"PreferenceLoss({' + '.join(map(str, self.terms))}{weighting})"
