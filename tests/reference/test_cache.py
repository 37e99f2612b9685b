"""The cache on disk: whole parts or none, and nothing that cannot be trusted."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from dpo_fast.files import probe_writable, remove_stale_temporaries, write_atomic
from dpo_fast.reference.cache import CacheError, LogpsCache

IDENTITY = {"reference": "abc", "truncation": {"max_length": 8}}


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 16), dtype=np.uint8), rng.normal(size=(n, 4))


def filled(root: Path, parts: int = 2) -> LogpsCache:
    cache = LogpsCache(root, IDENTITY)
    for seed in range(parts):
        cache.write(*rows(5, seed))
    return cache


def part_of(cache: LogpsCache) -> Path:
    return sorted(cache.folder.glob("part-*"))[0]


def test_rows_come_back_bit_for_bit_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path)
    cache = LogpsCache(tmp_path, IDENTITY)
    cache.refresh()
    digests, values = (np.concatenate(x) for x in zip(rows(5, 0), rows(5, 1), strict=True))
    order = np.random.default_rng(3).permutation(10)
    got, found = cache.lookup(digests[order])
    assert found.all() and len(cache) == 10
    np.testing.assert_array_equal(got, values[order])
    got, found = cache.lookup(rows(3, seed=9)[0])
    assert not found.any() and np.isnan(got).all()


def test_refresh_reads_what_others_wrote_once(tmp_path: Path, monkeypatch: Any) -> None:
    mine, theirs = LogpsCache(tmp_path, IDENTITY), LogpsCache(tmp_path, IDENTITY)
    mine.write(*rows(2, 0))
    theirs.refresh()
    mine.write(*rows(2, 1))
    reads: list[Path] = []
    original = LogpsCache._read
    monkeypatch.setattr(LogpsCache, "_read", lambda s, p: reads.append(p) or original(s, p))
    theirs.refresh()
    mine.refresh()
    assert len(theirs) == 4 and len(reads) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"reference": "abd", "truncation": {"max_length": 8}},
        {"reference": "abc", "truncation": {"max_length": 9}},
        {"reference": "abc", "truncation": {"max_length": 8}, "more": None},
    ],
)
def test_another_identity_is_another_folder(tmp_path: Path, other: dict[str, Any]) -> None:
    filled(tmp_path)
    cache = LogpsCache(tmp_path, other)
    cache.refresh()
    assert len(cache) == 0 and cache.folder != LogpsCache(tmp_path, IDENTITY).folder
    same = LogpsCache(tmp_path, dict(reversed(IDENTITY.items())))
    assert same.folder == LogpsCache(tmp_path, IDENTITY).folder


def flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def renamed(path: Path) -> None:
    path.rename(path.with_name("part-" + "0" * 64 + ".safetensors"))


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.with_name(f"part-{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)


def of_another_key(path: Path) -> None:
    digests, values = rows(5)
    tensors = {"digests": digests, "values": values}
    replaced(path, save_safetensors(tensors, metadata={"key": "f" * 32}))


def with_another_content(path: Path) -> None:
    key = path.parent.name
    replaced(path, save_safetensors({"values": np.zeros((5, 3))}, metadata={"key": key}))


def with_nan(path: Path) -> None:
    digests, values = rows(5)
    values[2, 1] = np.nan
    tensors = {"digests": digests, "values": values}
    replaced(path, save_safetensors(tensors, metadata={"key": path.parent.name}))


def not_safetensors(path: Path) -> None:
    replaced(path, b"hello, I am a text file")


@pytest.mark.parametrize(
    "damage",
    [
        flipped_bit,
        truncated,
        emptied,
        renamed,
        of_another_key,
        with_another_content,
        with_nan,
        not_safetensors,
    ],
)
def test_damaged_or_foreign_parts_are_refused(tmp_path: Path, damage: Any) -> None:
    cache = filled(tmp_path)
    damage(part_of(cache))
    with pytest.raises(CacheError, match=r"Refusing.*part-.*Delete that file.*ref_cache_dir"):
        LogpsCache(tmp_path, IDENTITY).refresh()


@pytest.mark.parametrize("content", [None, "{", '{"reference": "other"}', "[]"])
def test_missing_or_foreign_manifests_are_refused(tmp_path: Path, content: str | None) -> None:
    cache = filled(tmp_path)
    manifest = cache.folder / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(CacheError, match=r"Refusing.*manifest\.json"):
        LogpsCache(tmp_path, IDENTITY).refresh()


def test_a_folder_of_another_model_under_our_name_is_refused(tmp_path: Path) -> None:
    cache = LogpsCache(tmp_path, {"reference": "another"})
    cache.write(*rows(3))
    cache.folder.rename(LogpsCache(tmp_path, IDENTITY).folder)
    with pytest.raises(CacheError, match="describes another reference"):
        LogpsCache(tmp_path, IDENTITY).refresh()


def test_the_manifest_says_what_the_key_stands_for(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert json.loads((cache.folder / "manifest.json").read_text()) == {"format": 1, **IDENTITY}


def _write_many(root: str, seed: int, count: int) -> None:
    cache = LogpsCache(root, IDENTITY)
    for i in range(count):
        cache.write(*rows(4, seed=seed * 100 + i % 20))
        cache.refresh()


def test_jobs_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two write the same rows, one others; all read meanwhile."""
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_write_many, args=(str(tmp_path), s, 30)) for s in (1, 1, 2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    cache = LogpsCache(tmp_path, IDENTITY)
    cache.refresh()
    assert len(cache) == 2 * 20 * 4
    assert not list(cache.folder.glob(".tmp-*"))


def test_atomic_writes_leave_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_temporaries_of_dead_writers_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; import dpo_fast.files as f;"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        "f.write_atomic(Path(sys.argv[1]) / 'file', b'x')"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9 and len(list(tmp_path.glob(".tmp-*"))) == 1
    import socket

    living = tmp_path / f".tmp-{socket.gethostname()}-{os.getpid()}-abc"
    elsewhere = tmp_path / ".tmp-otherhost-4194305-abc"  # a number beyond any process here
    old = tmp_path / ".tmp-otherhost-2-abc"
    for path in (living, elsewhere, old):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    remove_stale_temporaries(tmp_path)
    assert sorted(tmp_path.glob(".tmp-*")) == sorted([living, elsewhere])


def test_unwritable_folders_are_found_before_any_work(tmp_path: Path) -> None:
    assert probe_writable(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert os.listdir(tmp_path / "new" / "folder") == []
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file / "below", file):
        with pytest.raises(
            OSError, match=r"output folder .* cannot be written .*nothing was started"
        ):
            probe_writable(folder)
    # no mode bits: even root may not write into the kernel's tables
    with pytest.raises(OSError, match=r"reference cache folder .*Choose another folder"):
        probe_writable("/proc/dpo_fast", "reference cache")


def test_permission_errors_keep_their_type(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*owner, mode"):
        probe_writable(tmp_path)
