"""SIGKILL at random moments of a training: it goes on, and ends as if nothing had happened."""

import os
from pathlib import Path

import pytest

from tests.faults.kills import STRATEGIES, Whole, draw, kill_and_resume, uninterrupted

NUMBER = int(os.environ.get("DPO_FAST_KILLS", "5"))
SEED = int(os.environ.get("DPO_FAST_KILLS_SEED", "1"))


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """One run of each strategy that nobody kills."""
    needed = STRATEGIES[: min(NUMBER, len(STRATEGIES))]
    return {name: uninterrupted(name, tmp_path_factory.mktemp(name) / "whole") for name in needed}


def test_the_moments_cover_what_can_be_interrupted(wholes: dict[str, Whole]) -> None:
    seen = {moment for whole in wholes.values() for moment in whole.moments}
    for call in ("replace", "rename", "rmtree", "step", "__call__", "update_"):
        assert {f"before {call}", f"after {call}"} <= seen, call
    for writer in ("save", "safe_save_file", "save_file", "save_to_json", "fsync"):
        assert f"in {writer}" in seen, writer


@pytest.mark.parametrize("number", range(NUMBER))
def test_killed_and_resumed_equals_uninterrupted(
    wholes: dict[str, Whole], tmp_path: Path, number: int
) -> None:
    kill = draw(NUMBER, wholes, SEED)[number]
    kill_and_resume(kill, wholes[kill.strategy], tmp_path)
