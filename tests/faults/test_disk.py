"""Full and read-only disks: the message says what to do, and what was there stays valid."""

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_fast.checkpoint import newest_complete_checkpoint, verify_checkpoint
from dpo_fast.reference.cache import LogpsCache
from tests.faults import jobs
from tests.faults.kills import assert_nothing_partial, cached_rows
from tests.nursery import Child, run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def train_with_limit(folder: str, strategy: str, limit: int) -> None:
    """No file may become larger than ``limit`` bytes: the kernel refuses, whoever writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    jobs.train(strategy, folder, None, {"max_steps": 4})


def train_until_the_cache_is_full(folder: str, parts: int) -> None:
    """After so many parts of four rows the kernel refuses to write to the next one."""
    original, written = LogpsCache._write_part, []

    def limited(self: LogpsCache, *args: Any) -> Path:
        if len(written) == parts:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        written.append(0)
        try:
            return original(self, *args)
        finally:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    LogpsCache._write_part = limited  # type: ignore[method-assign]
    jobs.train("precomputed", folder, None, {})


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes of the files of a checkpoint."""
    folder = tmp_path_factory.mktemp("sizes")
    run(folder, jobs.train, "frozen", str(folder), None, {"max_steps": 2})
    final = folder / "run" / "checkpoint-2"
    return {path.name: path.stat().st_size for path in final.iterdir()}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_files_that_cannot_be_written(tmp_path: Path, sizes: dict[str, int], file: str) -> None:
    """safetensors writes in Rust, torch.save in C++: each has an error of its own."""
    assert sizes["model.safetensors"] < sizes["optimizer.pt"]
    limit = sizes[file] - 1
    child = Child(tmp_path / "log.txt", train_with_limit, str(tmp_path), "frozen", limit)
    assert child.wait() == 1, child.text()
    text = child.text()
    assert "checkpoint-2 could not be written" in text and "MiB were free" in text
    assert "Make room" in text and "resume_from_checkpoint=True" in text
    assert list((tmp_path / "run").glob("*checkpoint-*")) == []


def test_a_part_of_the_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """Two parts are stored, the third is cut short: the two stay, and the next run adds to them."""
    child = Child(tmp_path / "log.txt", train_until_the_cache_is_full, str(tmp_path), 2)
    assert child.wait() == 1, child.text()
    text = child.text()
    assert "The 8 rows that are stored there stay valid" in text and "File too large" in text
    assert "choose another ref_cache_dir" in text
    assert_nothing_partial(tmp_path)
    assert len(cached_rows(tmp_path)) == 8 and not list(tmp_path.rglob(".tmp-*"))
    run(tmp_path, jobs.train, "precomputed", str(tmp_path), None, {})
    assert len(cached_rows(tmp_path)) == 24


def test_a_full_disk_during_a_run(small_disk: Path) -> None:
    """Checkpoints of 0.6 MiB on a disk of 1 MiB: the second does not fit, the first stays."""
    child = Child(small_disk.parent / "log.txt", jobs.train, "frozen", str(small_disk), None, {})
    assert child.wait() == 1, child.text()
    text = child.text()
    assert "could not be written" in text and "MiB were free" in text, text
    newest, skipped = newest_complete_checkpoint(small_disk / "run")
    assert newest is not None and skipped == []
    verify_checkpoint(newest)
    assert newest.name in text or "Older checkpoints are untouched" in text
    # room is made: the run goes on from the last whole checkpoint
    command = ["mount", "-o", "remount,size=16m", str(small_disk)]
    subprocess.run(command, check=True)
    run(small_disk, jobs.train, "frozen", str(small_disk), None, {})
    verify_checkpoint(small_disk / "run" / f"checkpoint-{jobs.STEPS}")


def test_a_full_disk_under_the_cache(small_disk: Path) -> None:
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096) == 4096:
            pass
        raise OSError
    overrides = {"ref_cache_dir": str(small_disk / "refs")}
    place = small_disk.parent
    child = Child(place / "log.txt", jobs.train, "precomputed", str(place), None, overrides)
    assert child.wait() == 1
    assert "cannot be written" in child.text() and "Choose another folder" in child.text()
    filler.unlink()
    run(place, jobs.train, "precomputed", str(place), None, overrides)
    assert len(cached_rows(small_disk)) == 24


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    """As Linux remounts a disk with errors: the next checkpoint fails with the reason."""
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    run(small_disk, jobs.train, "frozen", str(small_disk), None, {"max_steps": 4})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    place = small_disk.parent
    overrides = {"output_dir": str(small_disk / "run")}
    child = Child(place / "log.txt", jobs.train, "frozen", str(place), None, overrides)
    assert child.wait() == 1
    assert "output folder" in child.text() and "Read-only file system" in child.text()
    verify_checkpoint(small_disk / "run" / "checkpoint-4")
