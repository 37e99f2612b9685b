"""Preference losses: pure functions of four log-probability vectors.

Every loss has the signature::

    loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, stats=None, **own)
        -> LossOutput(losses, chosen_rewards, rejected_rewards)      # each [P]

The vectors ``[P]`` are sums of token log-probabilities over each completion (weighted ones under
LD-DPO, whose weights are a matter of the batch, not of the loss). ``stats`` is a :class:`PairStats`
with what some losses need beyond them. ``own`` are the loss's options. The objective of a batch is
``(1 / num_pairs) * sum_p losses[p]``.

Numerics: at least float32, finite for any finite margin, float64 in gives float64 out. No host sync
and no data-dependent branch: the functions trace under ``torch.compile(fullgraph=True)``.

Rewards: ``beta * log-ratio``, detached, whatever the divergence, as TRL logs them; those of
reference-free losses are in their docstrings.

:func:`build_loss` checks options and makes one callable of names, lists with weights, and a user's
own callables. Attributes of the functions say what they need: ``separable``, ``needs_reference``,
``needs_nll``, ``needs_lengths``.
"""

from dpo_fast.losses.aot import aot, aot_unpaired
from dpo_fast.losses.apo import apo_down, apo_zero
from dpo_fast.losses.build import build_loss
from dpo_fast.losses.combine import PreferenceLoss
from dpo_fast.losses.cpo import cpo
from dpo_fast.losses.discopop import discopop
from dpo_fast.losses.dpo import cdpo, hinge, ipo, robust, sigmoid, sigmoid_norm
from dpo_fast.losses.exo import exo_pair
from dpo_fast.losses.f_divergence import F_DIVERGENCES, f_score
from dpo_fast.losses.kto_pair import kto_pair
from dpo_fast.losses.nca_bco import bco_pair, nca_pair
from dpo_fast.losses.orpo import orpo
from dpo_fast.losses.output import LossOutput
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.registry import LOSSES
from dpo_fast.losses.sft import sft
from dpo_fast.losses.simpo import simpo
from dpo_fast.losses.sppo import sppo_hard

__all__ = [
    "F_DIVERGENCES",
    "LOSSES",
    "LossOutput",
    "PairStats",
    "PreferenceLoss",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "build_loss",
    "cdpo",
    "cpo",
    "discopop",
    "exo_pair",
    "f_score",
    "hinge",
    "ipo",
    "kto_pair",
    "nca_pair",
    "orpo",
    "robust",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
]
