"""SIGKILL at any moment of the precompute: the next run goes on and gets the same bits."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpo_fast.reference import cache as cache_module
from dpo_fast.reference.precompute import Precompute
from dpo_fast.reference.precomputed import PrecomputedReference
from dpo_fast.reference.scored import ScoredReference
from dpo_fast.reference.sources import PolicySource
from tests.reference.common import collator, token_rows
from tests.tiny import tiny_model

ROWS, BATCH, PART = 40, 4, 8


def reference(root: Path) -> PrecomputedReference:
    how = Precompute(collator(14), BATCH, torch.device("cpu"), part_rows=PART)
    return PrecomputedReference(PolicySource(tiny_model()), how, None, root)


def data() -> Dataset:
    return Dataset.from_list(token_rows(ROWS))


def values(attached: Dataset) -> np.ndarray:
    return np.stack([np.array(attached[c]) for c in ("ref_chosen_logps", "ref_rejected_logps")])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(owner: Any, name: str, n: int, *, after: bool = False) -> None:
    """This process dies at the n-th call of `owner.name`."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == n and not after:
            die()
        result = original(*args, **kwargs)
        if calls[0] == n:
            die()
        return result

    setattr(owner, name, counted)


def run_and_die(root: Path, arm: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    arm()
    reference(root).attach(data())


MOMENTS: dict[str, Callable[[], None]] = {
    "before the first forward": lambda: nth_call(ScoredReference, "token_logps", 1),
    "in the middle of a part": lambda: nth_call(ScoredReference, "token_logps", 6),
    "part written, not renamed": lambda: nth_call(os, "replace", 3),
    "part renamed, not counted": lambda: nth_call(os, "replace", 3, after=True),
    "manifest written, not renamed": lambda: nth_call(os, "replace", 1),
    "manifest there, no part": lambda: nth_call(os, "replace", 1, after=True),
    "while a part is being synced": lambda: nth_call(os, "fsync", 6),
    "after the last part": lambda: nth_call(cache_module.LogpsCache, "write", 5, after=True),
}


def killed(root: Path, arm: Callable[[], None]) -> None:
    child = multiprocessing.get_context("fork").Process(target=run_and_die, args=(root, arm))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: Any) -> np.ndarray:
    return values(reference(tmp_path_factory.mktemp("whole")).attach(data()))


@pytest.mark.parametrize("moment", MOMENTS)
def test_goes_on_from_the_finished_parts(
    tmp_path: Path, moment: str, uninterrupted: np.ndarray
) -> None:
    killed(tmp_path, MOMENTS[moment])
    parts = len(list(tmp_path.rglob("part-*")))
    again = reference(tmp_path)
    assert (values(again.attach(data())) == uninterrupted).all()
    assert again.computed == ROWS - parts * PART
    assert reference(tmp_path).attach(data()) is not None


def test_killed_again_and_again_it_still_arrives(tmp_path: Path, uninterrupted: np.ndarray) -> None:
    for _ in range(4):
        killed(tmp_path, lambda: nth_call(ScoredReference, "token_logps", 4))
    again = reference(tmp_path)
    assert (values(again.attach(data())) == uninterrupted).all()
    assert again.computed == ROWS - 4 * PART


def _slow(root: Path) -> None:
    torch.set_num_threads(1)
    original = ScoredReference.token_logps

    def slow(self: Any, batch: Any) -> torch.Tensor:
        time.sleep(0.01)
        return original(self, batch)

    ScoredReference.token_logps = slow  # type: ignore[method-assign]
    reference(root).attach(data())


def test_killed_from_outside_at_some_moment(tmp_path: Path, uninterrupted: np.ndarray) -> None:
    child = multiprocessing.get_context("fork").Process(target=_slow, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("part-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    again = reference(tmp_path)
    assert (values(again.attach(data())) == uninterrupted).all()
    assert 0 < again.computed < ROWS
