"""Curves of cost against size: ``seconds = a * size ** exponent``, fitted in logarithms."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Points = list[tuple[float, float]]


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Least squares slope of log(seconds) over log(size); None with fewer than three sizes."""
    usable = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in usable}) < 3:
        return None
    mean_x = sum(x for x, _ in usable) / len(usable)
    mean_y = sum(y for _, y in usable) / len(usable)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in usable)
    return covariance / sum((x - mean_x) ** 2 for x, _ in usable)


def curve(cases: Mapping[str, Any], axis: str, what: str = "seconds") -> dict[str, Points]:
    """``{variant: [(size, value), ..]}`` along one axis, from a result's cases, sizes ascending.

    The variant "limit" is the floor that the ceilings give.
    """
    found: dict[str, Points] = {}
    for case in cases.values():
        if axis not in case["curves"]:
            continue
        x = float(case["axes"][axis])
        for name, row in case["rows"].items():
            if row.get(what) is not None:
                found.setdefault(name, []).append((x, float(row[what])))
        if what == "seconds" and case.get("floor_seconds"):
            found.setdefault("limit", []).append((x, float(case["floor_seconds"])))
    return {name: sorted(points) for name, points in found.items()}


def axes_of(cases: Mapping[str, Any]) -> list[str]:
    """Axes that have a curve of at least two sizes, in the order in which they appear."""
    sizes: dict[str, set[float]] = {}
    for case in cases.values():
        for axis in case["curves"]:
            sizes.setdefault(axis, set()).add(float(case["axes"][axis]))
    return [axis for axis, seen in sizes.items() if len(seen) > 1]


def exponents(cases: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """``{axis: {variant: exponent}}``."""
    return {
        axis: {name: exponent(points) for name, points in curve(cases, axis).items()}
        for axis in axes_of(cases)
    }
