"""Correctness before speed: a variant whose result is off gets no number.

The yardstick is float64 on the same inputs. What an honest implementation may be off by depends on
the dtype and the data, so the naive loop in the same dtype, which runs first, sets the limit: four
times its error, but at least ``soft`` (nothing finer is asked for) and at most ``hard`` (the naive
loop itself must pass).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

Errors = dict[str, float]

FACTOR = 4.0


class Gate:
    """Judges what a step returns.

    Args:
        measure: the errors of an output against float64, by name.
        soft: an error up to which a result is as good as exact, for each name.
        hard: an error above which a result is wrong, whatever the naive loop gives.
    """

    def __init__(
        self,
        measure: Callable[[Any], Errors],
        soft: Mapping[str, float],
        hard: Mapping[str, float] | None = None,
    ) -> None:
        self.measure = measure
        self.soft = dict(soft)
        self.hard = dict(hard or soft)
        self.eager: Errors = {}

    def calibrate(self, errors: Errors) -> None:
        """Take the naive loop's errors as what the dtype gives."""
        self.eager = {name: error for name, error in errors.items() if math.isfinite(error)}

    def limit(self, name: str) -> float:
        """The largest error of that name that passes."""
        allowed = max(self.soft[name], FACTOR * self.eager.get(name, 0.0))
        return min(self.hard[name], allowed)

    def refusal(self, errors: Errors) -> str | None:
        """Why these errors give no speed, or None: they pass.

        Raises:
            KeyError: an error without a limit.
        """
        for name, error in errors.items():
            if not error <= self.limit(name):  # NaN does not pass either
                return f"{name} is off by {error:.2e}, more than {self.limit(name):.1e}: no speed"
        return None
