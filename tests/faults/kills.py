"""Kill a training at a random moment, let it go on, compare all with a run that was not killed."""

import hashlib
import json
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.checkpoint import verify_checkpoint
from tests.faults import jobs
from tests.nursery import Child, run

STRATEGIES = ("precomputed", "ema", "frozen", "adapter")
FINAL = f"checkpoint-{jobs.STEPS}"
# what a checkpoint says about the clock and the folder, not about the training; torch's DCP gives
# each a random name, too, in .metadata
_OF_THE_RUN = {"trainer_state.json", "training_args.bin", "README.md"}
_CLOCK = (
    "perf/",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
)


@dataclass(frozen=True)
class Whole:
    """A run that was not killed: what came out, how long it took, which moments it had."""

    result: dict[str, Any]
    seconds: float
    moments: tuple[str, ...]


def uninterrupted(strategy: str, folder: Path) -> Whole:
    """Train once from start to end."""
    folder.mkdir(parents=True)
    run(folder, jobs.train, strategy, str(folder), None, {})
    facts = json.loads((folder / "facts.json").read_text())
    return Whole(result_of(folder), facts["seconds"], tuple(facts["moments"]))


def result_of(folder: Path) -> dict[str, Any]:
    """Hashes of the final checkpoint's weights, optimizer, schedule, generators and reference;
    every logged number; every value in the cache.
    """
    final = folder / "run" / FINAL
    verify_checkpoint(final)
    files = json.loads((final / "manifest.json").read_text())["files"]
    hashes = {
        name: entry["sha256"]
        for name, entry in files.items()
        if name not in _OF_THE_RUN and not name.endswith("/.metadata")
    }
    state = json.loads((final / "trainer_state.json").read_text())
    log = [
        {key: value for key, value in entry.items() if not key.startswith(_CLOCK)}
        for entry in state["log_history"]
    ]
    return {"files": hashes, "log": log, "cache": cached_rows(folder)}


def cached_rows(folder: Path) -> dict[str, str]:
    """Digest of a row to its values, of all parts; a row that stands there twice fails."""
    from safetensors.numpy import load_file

    rows: dict[str, str] = {}
    for part in folder.rglob("part-*"):
        tensors = load_file(part)
        for digest, values in zip(tensors["digests"], tensors["values"], strict=True):
            assert digest.tobytes().hex() not in rows
            rows[digest.tobytes().hex()] = values.tobytes().hex()
    return rows


def assert_nothing_partial(folder: Path) -> None:
    """Whatever a reader could take for a part of the cache or a checkpoint is whole.

    Deleting an old checkpoint may have been cut short: those older than the newest do not count.
    """
    for part in folder.rglob("part-*"):
        name = f"part-{hashlib.sha256(part.read_bytes()).hexdigest()}.safetensors"
        assert part.name == name
    steps = {int(p.name[11:]): p for p in (folder / "run").glob("checkpoint-*")}
    if steps:
        verify_checkpoint(steps[max(steps)])


@dataclass(frozen=True)
class Kill:
    """Of which run, and when: at a numbered moment, or after a share of the time it takes."""

    strategy: str
    moment: int | None
    share: float

    def describe(self, whole: Whole) -> str:
        """For the message of a failed test."""
        if self.moment is None:
            return f"{self.strategy}, after {self.share:.0%} of {whole.seconds:.1f} s"
        return f"{self.strategy}, moment {self.moment}: {whole.moments[self.moment - 1]}"


def draw(number: int, wholes: dict[str, Whole], seed: int) -> list[Kill]:
    """``number`` kills, strategies in turn, every other one by the clock."""
    rng = random.Random(seed)
    kills = []
    for i in range(number):
        strategy = STRATEGIES[i % len(STRATEGIES)]
        by_clock = i // len(STRATEGIES) % 2 == 1
        moment = None if by_clock else rng.randint(1, len(wholes[strategy].moments))
        kills.append(Kill(strategy, moment, rng.random()))
    return kills


def kill_and_resume(kill: Kill, whole: Whole, folder: Path) -> None:
    """Start, kill, look, go on, compare.

    A run that was faster than expected and ended before its kill starts again, with a kill earlier.
    """
    share, trial = kill.share, 0
    while True:
        place = folder / str(trial)
        place.mkdir(parents=True)
        child = Child(place / "log.txt", jobs.train, kill.strategy, str(place), kill.moment, {})
        if kill.moment is None:
            child.kill(after=share * whole.seconds)
        code = child.wait()
        if code == -signal.SIGKILL:
            break
        assert code == 0 and kill.moment is None, child.text()
        share, trial = share / 2, trial + 1
    assert_nothing_partial(place)
    run(place, jobs.train, kill.strategy, str(place), None, {})
    assert result_of(place) == whole.result, kill.describe(whole)
