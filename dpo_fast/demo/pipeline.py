"""The demo, from the shipped pairs to the table and the picture."""

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_fast.demo.checker import prefers
from dpo_fast.demo.data import Pair, read_pairs
from dpo_fast.demo.report import COLUMNS, NOTES, checks_of, markdown, rows_of, samples_text, table
from dpo_fast.demo.settings import STRATEGIES, Settings, Thresholds

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")


def run_demo(
    output_dir: str | Path = "runs/demo",
    seed: int = 0,
    *,
    settings: Settings | None = None,
    strategies: Sequence[str] = STRATEGIES,
) -> int:
    """Train the small model of the demo with each reference strategy, and compare them.

    Writes ``demo.md``, ``demo.json``, ``demo.png``, and a folder for every model, into
    ``output_dir``. Nothing is downloaded.

    Args:
        seed: of weights and order; the pairs are shipped and stay the same.
        settings: None: the demo's own, with ``seed``.

    Returns:
        The exit code: 0 if everything held that the demo claims (:class:`Thresholds`), else 1.

    Raises:
        OSError: the folder cannot be written. RuntimeError: a stage failed.
    """
    from dpo_fast.files import probe_writable

    folder = Path(output_dir)
    probe_writable(folder, "output folder")
    settings = settings or Settings(seed=seed)
    begin = time.perf_counter()
    with _offline():
        results = _run(folder, settings, strategies)
    results["seconds"] = time.perf_counter() - begin
    checks = checks_of(results, Thresholds())
    _write(folder, results, markdown(results, checks))
    _say_outcome(folder, results)
    failed = [check for check in checks if not check.passed]
    for check in failed:
        print(f"FAILED: {check.what}")
    print(f"{len(checks) - len(failed)} of {len(checks)} claims hold; {results['seconds']:.0f} s.")
    return 1 if failed else 0


@contextmanager
def _offline() -> Iterator[None]:
    """No hub, for this process and those it starts; afterwards as before."""
    old = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(folder: Path, settings: Settings, strategies: Sequence[str]) -> dict[str, Any]:
    from dpo_fast.demo.processes import StageProcesses

    processes = StageProcesses()
    total = 2 + len(strategies)
    results: dict[str, Any] = {"settings": asdict(settings), "machine": _machine(settings)}
    _title(1, total, "the preference set")
    train, heldout = read_pairs("train"), read_pairs("heldout")
    results["data"] = check_data(train, heldout)
    results["baselines"] = _baselines(train, heldout)
    _title(2, total, "a small Llama learns right and wrong answers alike (supervised)")
    results["before"] = processes.run("prepare_base", str(folder), settings)
    _say_before(results["before"])
    results["strategies"] = {}
    for number, name in enumerate(strategies, start=3):
        _title(number, total, f"DPO, reference = {name}")
        result = processes.run("train_strategy", name, str(folder), settings)
        results["strategies"][name] = result
        print(f"  accuracy {result['accuracy']:.3f}, {result['seconds']:.1f} s", flush=True)
    return results


def check_data(train: Sequence[Pair], heldout: Sequence[Pair]) -> dict[str, int]:
    """Sizes, pairs that the checker refutes, questions that stand in both splits."""
    wrong = [
        pair
        for pair in [*train, *heldout]
        if not prefers(pair.prompt, pair.chosen) or prefers(pair.prompt, pair.rejected)
    ]
    shared = {pair.prompt for pair in train} & {pair.prompt for pair in heldout}
    pair = train[0]
    print(f"  {len(train)} train pairs, {len(heldout)} held-out pairs, such as")
    print(f"    question  {pair.prompt}\n    chosen    {pair.chosen}")
    print(f"    rejected  {pair.rejected}")
    return {
        "train": len(train),
        "heldout": len(heldout),
        "wrong_pairs": len(wrong),
        "shared_questions": len(shared),
    }


def _baselines(train: Sequence[Pair], heldout: Sequence[Pair]) -> dict[str, float]:
    from dpo_fast.demo.baselines import BASELINES

    accuracies = {name: rule(train, heldout) for name, rule in BASELINES.items()}
    print("  accuracy on the held-out pairs without reading the question:")
    for name, accuracy in accuracies.items():
        print(f"    {name:<36}{accuracy:.3f}", flush=True)
    return accuracies


def _title(number: int, total: int, text: str) -> None:
    print(f"[{number}/{total}] {text}", flush=True)


def _say_before(before: dict[str, Any]) -> None:
    print(
        f"  {before['parameters'] / 1e6:.2f} M parameters, vocabulary {before['vocabulary']}, "
        f"{before['tokens']:.0f} tokens a dialogue; accuracy before DPO {before['accuracy']:.3f}",
        flush=True,
    )


def _say_outcome(folder: Path, results: dict[str, Any]) -> None:
    first = next(iter(results["strategies"]))
    print(f"\nHeld-out questions, before and after DPO (reference = {first}):\n")
    print(samples_text(results, first))
    print(f"\n{table(COLUMNS, rows_of(results))}\n\n{NOTES}\n")
    print(f"Table and picture: {folder / 'demo.md'}, {folder / 'demo.png'}")


def _write(folder: Path, results: dict[str, Any], report: str) -> None:
    from dpo_fast.demo.picture import draw
    from dpo_fast.files import write_atomic

    write_atomic(folder / "demo.json", json.dumps(results, indent=1).encode())
    write_atomic(folder / "demo.md", report.encode())
    write_atomic(folder / "demo.png", draw(results, Thresholds()))


def _machine(settings: Settings) -> str:
    where = "CPU" if settings.use_cpu else "GPU"
    return f"{where}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
