"""The lock of a folder: one holder at a time, free again when the holder is killed."""

import errno
import fcntl
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_fast.lock import LOCK_FILE, folder_lock
from tests.nursery import Child, ends, launch, wait_until


def hold(folder: str) -> None:
    with folder_lock(Path(folder)) as held:
        assert held
        (Path(folder) / "held").touch()
        time.sleep(600)


def count_up(folder: str, times: int) -> None:
    """Without the lock, increments would be lost."""
    number = Path(folder) / "number"
    for _ in range(times):
        with folder_lock(Path(folder)):
            value = int(number.read_text())
            time.sleep(0.001)
            number.write_text(str(value + 1))


def test_a_killed_holder_frees_it(tmp_path: Path) -> None:
    holder = Child(tmp_path / "log.txt", hold, str(tmp_path))
    wait_until((tmp_path / "held").exists)
    with folder_lock(tmp_path, patience=0.2) as held:
        assert not held
    holder.kill()
    holder.wait()
    with folder_lock(tmp_path, patience=60) as held:
        assert held


def test_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    assert ends(launch(tmp_path, 3, count_up, str(tmp_path), 40)) == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "120"


def test_a_sleeping_holder_is_passed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with folder_lock(tmp_path) as first, folder_lock(tmp_path, patience=0.1) as second:
        assert first and not second
    assert "may be suspended" in caplog.text


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock(tmp_path) as held:
        assert not held
    assert (tmp_path / LOCK_FILE).exists()
