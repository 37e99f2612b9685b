"""Reference log-probs on disk: one folder a key, immutable parts named by their own hash.

A key stands for everything that changes the values of a row (reference, precision, truncation); the
rows in it are found by the digest of their token ids. So a dataset that grew, was shuffled or split
anew finds the rows it shares. Nothing is ever changed in place: a part is written aside, synced and
renamed to the SHA-256 of its bytes. A kill at any moment leaves whole parts. Jobs on one key may
compute a row twice; it is stored once, by the one that first has the folder's lock (``flock``,
which dies with its holder).

Layout::

    <root>/<key>/manifest.json                  what the key stands for
    <root>/<key>/part-<sha256>.safetensors      digests [n, 16] uint8, values [n, 4] float64

The four values of a row are the sums over the head and the tail of the chosen and of the rejected
answer, the head being as long as the shorter answer: ``head + ld_alpha * tail`` serves every
``ld_alpha`` (None: 1), at 48 bytes a pair (per-token values: about 2 kB).
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from dpo_fast.files import remove_stale_temporaries, write_atomic
from dpo_fast.lock import folder_lock
from dpo_fast.reference.fingerprint import digest_of

FORMAT = 1
DIGEST_BYTES = 16
NUM_VALUES = 4
MANIFEST = "manifest.json"
_RECENT_SECONDS = 180.0
_PART = re.compile(r"^part-([0-9a-f]{64})\.safetensors$")


class CacheError(ValueError):
    """A cache that cannot be trusted; the message names the file and the remedy."""


class LogpsCache:
    """The rows of one key.

    Args:
        root: folder of all keys.
        identity: JSON-able; everything that changes the values of a row, and nothing else.
    """

    def __init__(self, root: str | Path, identity: Mapping[str, Any]) -> None:
        self.identity = {"format": FORMAT, **identity}
        self.key = digest_of(self.identity)[:32]
        self.folder = Path(root).expanduser().absolute() / self.key
        self._tidied = False
        self._seen: set[str] = set()
        self._rows: dict[bytes, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def refresh(self) -> None:
        """Read and check the parts that have come since the last time.

        Raises:
            CacheError: a part is damaged or belongs to another key, or the manifest does.
        """
        if not self.folder.is_dir():
            return
        names = sorted(p.name for p in self.folder.glob("part-*"))
        if names or (self.folder / MANIFEST).exists():
            self._check_manifest()
        for name in names:
            if name not in self._seen:
                self._read(self.folder / name)
                self._seen.add(name)

    def has(self, digests: np.ndarray) -> np.ndarray:
        """Mask ``[n]`` of the rows that have been read or written here."""
        return np.array([digest.tobytes() in self._rows for digest in digests], dtype=bool)

    def is_being_filled(self) -> bool:
        """Whether another job has written here in the last minutes."""
        if not self.folder.is_dir():
            return False
        newest = max((p.stat().st_mtime for p in self.folder.glob("part-*")), default=0.0)
        return time.time() - newest < _RECENT_SECONDS

    def lookup(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values ``[n, 4]`` float64 (NaN where missing) and a mask ``[n]`` of the rows found."""
        values = np.full((len(digests), NUM_VALUES), np.nan)
        found = np.zeros(len(digests), dtype=bool)
        for i, digest in enumerate(digests):
            row = self._rows.get(digest.tobytes())
            if row is not None:
                values[i], found[i] = row, True
        return values, found

    def write(self, digests: np.ndarray, values: np.ndarray) -> Path | None:
        """Store rows as one part, durable when this returns.

        Rows that another job has stored in the meantime keep its values, so that a row has one
        value for everybody and for ever.

        Args:
            digests: ``[n, 16]`` uint8. values: ``[n, 4]`` float64, finite.

        Returns:
            The part; None if all rows were there already.

        Raises:
            OSError: the part cannot be written (full disk); what is stored stays valid.
            CacheError: as :meth:`refresh`.
        """
        assert digests.shape == (len(values), DIGEST_BYTES) and digests.dtype == np.uint8
        assert values.shape[1:] == (NUM_VALUES,) and values.dtype == np.float64
        try:
            self._ensure_folder()
            with folder_lock(self.folder):
                self.refresh()
                new = ~self.has(digests)
                return self._write_part(digests[new], values[new]) if new.any() else None
        except OSError as error:
            raise OSError(
                error.errno,
                f"The cache of reference log-probs in {self.folder} cannot be written "
                f"({error.strerror or error}). The {len(self)} rows that are stored there stay "
                "valid: make room or choose another ref_cache_dir, and run the same command again; "
                "it goes on from them",
            ) from error

    def _write_part(self, digests: np.ndarray, values: np.ndarray) -> Path:
        tensors = {"digests": np.ascontiguousarray(digests), "values": np.ascontiguousarray(values)}
        data = save_safetensors(tensors, metadata={"key": self.key, "format": str(FORMAT)})
        path = self.folder / f"part-{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomic(path, data)
        self._seen.add(path.name)
        self._take(digests, values)
        return path

    def adopt(self, digests: np.ndarray, values: np.ndarray, *, store: bool) -> None:
        """Take rows that another rank computed and that are not on this machine's disk."""
        new = ~self.has(digests)
        if store and new.any():
            self.write(digests[new], values[new])
        else:
            self._take(digests, values)

    def _ensure_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._tidied:
            remove_stale_temporaries(self.folder)
            self._tidied = True
        if not (self.folder / MANIFEST).exists():
            text = json.dumps(self.identity, indent=2, sort_keys=True)
            write_atomic(self.folder / MANIFEST, text.encode())

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        try:
            stored = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._refusal(path, f"is missing or unreadable ({error})") from error
        if digest_of(stored)[:32] != self.key:
            raise self._refusal(path, "describes another reference than its folder's name")

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        named = _PART.match(path.name)
        actual = hashlib.sha256(data).hexdigest()
        if named is None or named.group(1) != actual:
            raise self._refusal(path, f"is damaged or was edited: its SHA-256 is {actual}")
        try:
            tensors = load_safetensors(data)
            key = _metadata(data).get("key")
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._refusal(path, f"is not a part of a cache ({error})") from error
        if key != self.key:
            raise self._refusal(
                path, f"belongs to the key {key!r}: another reference or truncation"
            )
        digests, values = tensors.get("digests"), tensors.get("values")
        if (
            digests is None
            or values is None
            or digests.dtype != np.uint8
            or values.dtype != np.float64
            or digests.shape != (len(values), DIGEST_BYTES)
            or values.shape[1:] != (NUM_VALUES,)
            or not np.isfinite(values).all()
        ):
            raise self._refusal(path, "does not hold digests [n, 16] and finite values [n, 4]")
        self._take(digests, values)

    def _take(self, digests: np.ndarray, values: np.ndarray) -> None:
        for digest, row in zip(digests, values, strict=True):
            # stored twice only where the file system has no locks: counts as it was read first
            self._rows.setdefault(digest.tobytes(), row)

    def _refusal(self, path: Path, what: str) -> CacheError:
        return CacheError(
            f"Refusing the cache of reference log-probs: {path} {what}. Delete that file (its "
            f"rows are computed again) or the folder {self.folder}, or choose another "
            "ref_cache_dir."
        )


def _metadata(data: bytes) -> dict[str, str]:
    """``__metadata__`` of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def default_root() -> Path:
    """``ref_cache_dir`` where none is given: beside the datasets cache of Hugging Face."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE).expanduser().parent / "dpo_fast" / "ref_logps"
