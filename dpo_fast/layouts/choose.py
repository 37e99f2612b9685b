"""The batch layout of a run: the one asked for where the model allows it, or the one that pays.

Legend: P pairs.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from dpo_fast.batch import PlannedCollator
from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.layouts.lengths import PairLengths
from dpo_fast.layouts.packed import PackedCollator, SharedPrefixCollator
from dpo_fast.layouts.probe import can_probe, probe_error
from dpo_fast.layouts.support import why_not_packed, why_not_shared

logger = logging.getLogger("dpo_fast")

LAYOUTS = ("auto", "padded", "packed", "shared_prefix")
# Below this share of tokens saved, the simpler layout is taken.
_WORTH = 0.02


class LayoutChoice(NamedTuple):
    """``name``: padded, packed or shared_prefix; ``reason``: one line for the log."""

    name: str
    reason: str

    @property
    def is_packed(self) -> bool:
        """Whether batches are packed rows, which need dpo_fast's attention."""
        return self.name != "padded"


def choose_layout(
    layout: str,
    model: nn.Module,
    *,
    ref_model: nn.Module | None = None,
    lengths: PairLengths | None = None,
    batch_size: int = 8,
    unsupported: str | None = None,
) -> LayoutChoice:
    """Choose, and say so in one log line.

    A layout that would be wrong for the model is never taken, also when it was named: shared_prefix
    falls back to packed, packed to padded. Structure decides first, then a few tokens through the
    model in both layouts, where its weights are not sharded.

    Args:
        layout: one of ``LAYOUTS``. ``"auto"``: the fewest tokens on ``lengths``, and the simpler
            layout where the gain is below 2 percent.
        model: the policy. ref_model: a reference that is a model of its own.
        lengths: of the training pairs; None where they are not known (streams).
        batch_size: pairs of a padded batch, for the comparison.
        unsupported: why the run needs padded rows, whatever the model; None: it does not.

    Raises:
        ValueError: ``layout`` is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"batch_layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    if layout == "padded":
        return LayoutChoice("padded", "as asked")
    choice = _supported(layout, model, ref_model, unsupported)
    named = layout != "auto"
    if not named:
        choice = _worthwhile(choice, lengths, batch_size)
    fallen = named and choice.name != layout
    level = logging.WARNING if fallen else logging.INFO
    logger.log(level, "batch_layout=%s: %s (%s).", layout, choice.name, choice.reason)
    return choice


def make_collator(
    choice: LayoutChoice,
    *,
    pad_token_id: int,
    max_length: int | None,
    truncation_mode: str,
    pad_to_multiple_of: int | None = None,
    few_shapes: bool = False,
    plan_rows: Callable[[Tensor, Tensor], Any] | None = None,
) -> Callable[[list[Any]], dict[str, Any]]:
    """The collator of a layout.

    ``pad_to_multiple_of`` and ``plan_rows`` concern padded rows, ``few_shapes`` packed ones.
    """
    if not choice.is_packed:
        return PlannedCollator(
            DataCollatorForPreference(
                pad_token_id, max_length, truncation_mode, pad_to_multiple_of
            ),
            plan_rows=plan_rows,
        )
    collator = SharedPrefixCollator if choice.name == "shared_prefix" else PackedCollator
    return collator(pad_token_id, max_length, truncation_mode, few_shapes)


def why_not_joined(model: nn.Module, ref_model: nn.Module | None) -> str | None:
    """Why padded rows cannot run as one row without padding; None if they can."""
    models = [m for m in (model, ref_model) if m is not None]
    return _first_reason(models, why_not_packed, PackedCollator(pad_token_id=0))


def _supported(
    layout: str, model: nn.Module, ref_model: nn.Module | None, unsupported: str | None
) -> LayoutChoice:
    """The best layout up to the one asked for that is right for all models."""
    if unsupported is not None:
        return LayoutChoice("padded", unsupported)
    models = [m for m in (model, ref_model) if m is not None]
    reasons = []
    if layout != "packed":
        reason = _first_reason(models, why_not_shared, SharedPrefixCollator(pad_token_id=0))
        if reason is None:
            return LayoutChoice("shared_prefix", "each prompt is computed once")
        reasons.append(reason)
    reason = why_not_joined(model, ref_model)
    if reason is None:
        return LayoutChoice("packed", reasons[0] if reasons else "no padding is computed")
    return LayoutChoice("padded", reason)


def _first_reason(
    models: list[nn.Module], structure: Callable[[nn.Module], str | None], collator: PackedCollator
) -> str | None:
    for model in models:
        reason = structure(model)
        if reason is None and can_probe(model):
            reason = probe_error(model, collator)
        if reason is not None:
            return reason
    return None


def _worthwhile(choice: LayoutChoice, lengths: PairLengths | None, batch_size: int) -> LayoutChoice:
    """The supported layout, or a simpler one where that computes hardly more tokens."""
    if not choice.is_packed:
        return choice
    if lengths is None or not len(lengths.chosen):
        return LayoutChoice(choice.name, f"{choice.reason}; lengths are not known")
    padded, packed = lengths.padded(batch_size), int(lengths.packed.sum())
    tokens = {"packed": packed, "shared_prefix": int(lengths.shared_prefix.sum())}
    names = ["shared_prefix", "packed"] if choice.name == "shared_prefix" else ["packed"]
    simpler = {"shared_prefix": packed, "packed": padded}
    for name in names:
        if tokens[name] <= (1.0 - _WORTH) * simpler[name]:
            gain = f"{padded / tokens[name]:.2f}x fewer tokens than padded rows"
            kept = "" if name == choice.name else "; prompts are too short to share"
            because = "" if choice.name != "packed" else f"; {choice.reason}"
            return LayoutChoice(name, f"{gain} on {len(lengths.chosen)} pairs{kept}{because}")
    return LayoutChoice("padded", "packing would save less than 2 percent of the tokens")
