"""A backbone's forward of which somebody reads scored positions only."""

from collections.abc import Callable, Mapping
from typing import Any

from dpo_fast.batch import SEGMENTS_KEY


def run_backbone(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    """``run(**inputs)``; and once more, with all rows, where the last layer turns out to run more
    than once in a forward (recurrent depth): then its other rows are read after all.

    Args:
        run: the backbone.
        inputs: its arguments; ``pair_segments`` may say that this forward is a scored pass.
    """
    output = run(**inputs)
    segments = inputs.get(SEGMENTS_KEY)
    if segments is None or segments.scored_pass is None:
        return output
    segments.scored_pass.is_over = True
    if segments.scored_pass.is_wrong:
        return run(**{**inputs, SEGMENTS_KEY: segments.for_all()})
    return output
