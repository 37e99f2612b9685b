"""One case: every variant is checked, its memory measured, then all take turns."""

import statistics
from typing import Any

import torch

from dpo_fast.bench.case import Contest, LeftOut, Step, Variant
from dpo_fast.bench.memory import give_back, peak_extra
from dpo_fast.bench.timing import median_ratio, quartiles, take_turns
from dpo_fast.integrations.interface import InterfaceChanged

Row = dict[str, Any]

OURS = "dpo_fast"


def compare(contest: Contest, rounds: int, device: str) -> dict[str, Row]:
    """A row for each variant, in order: times, peak memory and errors, or why there are none.

    ``left_out``: it does not run here. ``refused``: it ran, and its result is off; no speed.
    """
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for variant in sorted(contest.variants, key=lambda v: v.name != contest.eager):
        row, step = _admit(variant, contest, device)
        rows[variant.name] = row
        if step is not None:
            steps[variant.name] = step
    times = take_turns(steps, rounds, device)
    for name, values in times.items():
        rows[name] |= _speed(values, times.get(OURS))
    for variant in contest.variants:
        if variant.work is not None and variant.name in times:
            rows[variant.name]["work"] = variant.work
    return {v.name: rows[v.name] for v in contest.variants}


def _admit(variant: Variant, contest: Contest, device: str) -> tuple[Row, Step | None]:
    """The row so far, and the step if it may be timed."""
    gate = contest.gate
    try:
        step = variant.prepare()
        errors = gate.measure(step())
        if variant.name == contest.eager:
            gate.calibrate(errors)
        row: Row = {"errors": errors}
        refusal = gate.refusal(errors)
        if refusal is not None:
            return row | {"refused": refusal}, None
        peak = peak_extra(step, device)
    except LeftOut as reason:
        return {"left_out": str(reason)}, None
    except InterfaceChanged:
        raise
    except torch.OutOfMemoryError as error:
        _after_out_of_memory(device)
        return {"left_out": f"out of memory: {_first_line(error)}"}, None
    except RuntimeError as error:
        if variant.name.startswith(OURS):
            raise  # ours must run wherever it is asked to
        return {"left_out": f"failed: {type(error).__name__}: {_first_line(error)}"}, None
    return row | ({} if peak is None else {"peak_mib": peak / 2**20}), step


def _speed(values: list[float], ours: list[float] | None) -> Row:
    row: Row = {
        "seconds": statistics.median(values),
        "quartiles": list(quartiles(values)),
        "all_seconds": values,
    }
    if ours is not None:
        row["over_ours"] = median_ratio(values, ours)
    return row


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _after_out_of_memory(device: str) -> None:
    give_back()
    if device == "cuda":
        torch.cuda.empty_cache()
