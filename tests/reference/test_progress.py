"""Progress of the precompute: a bar on a terminal, lines elsewhere, silence on other ranks."""

import logging
import sys
from typing import Any

import pytest

from dpo_fast.reference import progress as module
from dpo_fast.reference.progress import Progress


@pytest.fixture
def clock(monkeypatch: Any) -> list[float]:
    """The time that the progress sees."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_with_rates_every_ten_seconds(
    clock: list[float], caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO, logger="dpo_fast"), Progress(1000, "train") as progress:
        for _ in range(4):
            clock[0] += 6
            progress.advance(60, 3000)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "Reference log-probs of 'train': 120 of 1,000 pairs, 10.0 pairs/s, 500 tokens/s, 88 s to "
        "go",
        "Reference log-probs of 'train': 240 of 1,000 pairs, 10.0 pairs/s, 500 tokens/s, 76 s to "
        "go",
        "Reference log-probs of 'train': 240 pairs in 24.0 s (500 tokens/s).",
    ]


def test_a_bar_on_a_terminal(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(10, "train") as progress:
        progress.advance(4, 100)
        progress.advance(6, 100)
    shown = capsys.readouterr().err
    assert "Reference log-probs, train: 100%" in shown and "10/10" in shown and "tokens/s" in shown


def test_other_ranks_and_failures_are_silent(caplog: Any, capsys: Any) -> None:
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        with Progress(10, "train", show=False) as progress:
            progress.advance(10, 100)
        with pytest.raises(KeyboardInterrupt), Progress(10, "train"):
            raise KeyboardInterrupt
    assert not caplog.records and not capsys.readouterr().err
