"""What a loss declares about itself: attributes on the function, read by whoever calls it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

LossFn = TypeVar("LossFn", bound=Callable[..., Any])

# How a WPO weight enters: times the pair's loss; handed to the loss as `preference_weight` because
# it holds a likelihood term too; not at all; or the combination is refused.
WpoUse = Literal["losses", "preference_term", "none", "unsupported"]


@dataclass(frozen=True)
class Traits:
    """Declarations of one loss. The defaults are the safe ones for a stranger's callable."""

    separable: bool = False  # losses[p] depends on pair p only (and on global counts)
    needs_reference: bool = True
    needs_nll: bool = False  # reads stats.chosen_nll_sum
    needs_lengths: bool = False  # reads stats.chosen_len, stats.rejected_len
    needs_wpo: bool = False  # reads stats.wpo_weight itself
    f_divergence: bool = False  # a divergence other than reverse_kl has a meaning
    defines_rewards: bool = True  # False: its rewards are used only when no other loss is there
    wpo: WpoUse = "losses"


def declares(
    *,
    separable: bool = True,
    needs_reference: bool = True,
    needs_nll: bool = False,
    needs_lengths: bool = False,
    f_divergence: bool = False,
    defines_rewards: bool = True,
    wpo: WpoUse = "losses",
) -> Callable[[LossFn], LossFn]:
    """Decorator: sets each field of :class:`Traits` as an attribute of the loss function."""
    traits = Traits(
        separable=separable,
        needs_reference=needs_reference,
        needs_nll=needs_nll,
        needs_lengths=needs_lengths,
        f_divergence=f_divergence,
        defines_rewards=defines_rewards,
        wpo=wpo,
    )

    def decorate(fn: LossFn) -> LossFn:
        for field in fields(Traits):
            setattr(fn, field.name, getattr(traits, field.name))
        return fn

    return decorate


def traits_of(fn: Callable[..., Any]) -> Traits:
    """The declarations of any callable; what it does not declare has the safe default."""
    declared: dict[str, Any] = {f.name: getattr(fn, f.name, f.default) for f in fields(Traits)}
    return Traits(**declared)
