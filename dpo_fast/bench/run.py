"""``run``: suites to result files; a result is a JSON, a Markdown table and a picture."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dpo_fast.bench.case import Case
from dpo_fast.bench.ceilings import Ceilings, measure_ceilings
from dpo_fast.bench.compare import compare
from dpo_fast.bench.machine import machine_line, sources
from dpo_fast.bench.memory import give_back
from dpo_fast.bench.peers import versions
from dpo_fast.bench.settings import Settings
from dpo_fast.files import write_atomic

SUITES = ("head", "layout", "train_step", "reference", "ema", "precompute")
DEVICES = ("cpu", "cuda")

Result = dict[str, Any]
Say = Callable[[str], None]


def run(
    suites: Sequence[str] = SUITES,
    device: str = "cpu",
    quick: bool = False,
    out: str | Path = "runs/bench",
    *,
    only: str | None = None,
    seconds: float | None = None,
    rounds: int | None = None,
    say: Say = print,
) -> list[Path]:
    """Run suites and write ``suite_<name>_<device>.json``, ``.md`` and ``.png`` for each.

    A case that the JSON already holds, measured by the same sources on the same machine, is kept:
    a long suite can be run in several calls.

    Args:
        suites: names out of :data:`SUITES`.
        device: "cpu" or "cuda".
        quick: small sizes, few rounds; written as ``.._quick``.
        out: the folder, made if it is not there.
        only: run cases whose name contains this.
        seconds: start no new case after so long, over all suites.
        rounds: timed steps of each variant.
        say: gets each case's line as it is done.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown suite or device, no CUDA device, or no case named so.
        InterfaceChanged: a peer is installed and looks different from what was tested.
    """
    _check(suites, device)
    settings = Settings(device, quick, rounds)
    until = None if seconds is None else time.monotonic() + seconds
    logging.getLogger("dpo_fast").setLevel(logging.WARNING)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in suites:
        suite = import_module(f"dpo_fast.bench.suites.{name}")
        stem = f"suite_{name}_{device}" + ("_quick" if quick else "")
        written += _run_suite(suite, name, settings, folder / stem, only, until, say)
    return written


def _check(suites: Sequence[str], device: str) -> None:
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        raise ValueError(f"no suites {unknown or '(none given)'}: there are {', '.join(SUITES)}")
    if device not in DEVICES:
        raise ValueError(f"device={device!r} must be one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device: use device='cpu'")


def _run_suite(
    suite: ModuleType,
    name: str,
    settings: Settings,
    stem: Path,
    only: str | None,
    until: float | None,
    say: Say,
) -> list[Path]:
    cases: list[Case] = suite.cases(settings)
    wanted = [case for case in cases if only is None or only in case.name]
    if not wanted:
        raise ValueError(f"{name} has no case with {only!r}: {[case.name for case in cases]}")
    result = _begin(stem.with_suffix(".json"), name, suite, settings)
    ceilings: dict[torch.dtype, Ceilings] = {}
    for case in wanted:
        if case.name in result["cases"]:
            continue
        if until is not None and time.monotonic() > until:
            say(f"{name}: out of time before {case.name!r}; run the same command again")
            break
        begin = time.monotonic()
        result["cases"][case.name] = run_case(case, settings, ceilings)
        say(_line(name, case, result["cases"][case.name], time.monotonic() - begin))
        order = {c.name: i for i, c in enumerate(cases)}
        by_order = sorted(result["cases"].items(), key=lambda item: order.get(item[0], len(order)))
        result["cases"] = dict(by_order)
        _write_json(stem.with_suffix(".json"), result)
    # with nothing measured, an older result, table and picture stay as they are
    return write_report(stem, result) if result["cases"] else []


def run_case(case: Case, settings: Settings, ceilings: dict[torch.dtype, Ceilings]) -> Result:
    """One case as it stands in the JSON; ``ceilings`` measured in this call are used again."""
    contest = case.build()
    notes = dict(contest.notes)
    if hasattr(os, "getloadavg"):
        notes["load average"] = round(os.getloadavg()[0], 1)  # others on this machine
    if contest.dtype not in ceilings:
        ceilings[contest.dtype] = measure_ceilings(settings.device, contest.dtype, settings.quick)
    rows = compare(contest, case.rounds or settings.default_rounds, settings.device)
    moved = [
        row["work"] / min(row["all_seconds"])
        for name, row in rows.items()
        if name in contest.yardsticks and "seconds" in row
    ]
    top = ceilings[contest.dtype]
    top = top._replace(copy_bytes=max(top.copy_bytes, *moved, 0.0))
    floor = top.seconds(flop=contest.flop, moved=contest.moved)
    found = {
        "axes": dict(case.axes),
        "curves": list(case.curves),
        "notes": notes,
        "limits": {name: contest.gate.limit(name) for name in contest.gate.soft},
        "ceilings": top._asdict(),
        "floor_seconds": floor or None,
        "rows": rows,
    }
    del contest
    give_back()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return found


def write_report(stem: Path, result: Result) -> list[Path]:
    """The three files of a result; also to draw an old JSON again."""
    from dpo_fast.bench.picture import draw
    from dpo_fast.bench.report import markdown

    written = [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    _write_json(written[0], result)
    write_atomic(written[1], markdown(result).encode())
    write_atomic(written[2], draw(result))
    return written


def _begin(path: Path, name: str, suite: ModuleType, settings: Settings) -> Result:
    """A new result, with the cases of ``path`` that were measured with this code and machine."""
    machine = machine_line(settings.device)
    result: Result = {
        "suite": name,
        "about": (suite.__doc__ or "").splitlines()[0],
        "device": settings.device,
        "quick": settings.quick,
        "machine": machine,
        "sources": sources(),
        "peers": versions(),
        "cases": {},
    }
    if path.exists():
        old = json.loads(path.read_text())
        same = ("cpu", "threads", "torch", "triton", "gpu")
        same_machine = all(old["machine"].get(key) == machine.get(key) for key in same)
        if same_machine and old.get("sources") == result["sources"]:
            result["cases"] = old["cases"]
    return result


def _write_json(path: Path, result: Result) -> None:
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def _line(suite: str, case: Case, found: Result, taken: float) -> str:
    return f"{suite}: {case.name}: {', '.join(_words(found['rows'].items()))} ({taken:.0f} s)"


def _words(rows: Iterable[tuple[str, Any]]) -> list[str]:
    return [
        f"{name} {row['seconds'] * 1e3:.1f} ms" if "seconds" in row else f"{name} -"
        for name, row in rows
    ]
