"""Checkpoints that are whole or not there: staged, hashed in a manifest, synced, renamed.

transformers writes a checkpoint in place and resumes from the highest number, whole or not. Here it
writes into ``<output_dir>/.staging-checkpoint-N/checkpoint-N``, a name that neither its search nor
its rotation sees; when every rank has written, the main one hashes all files into
``manifest.json``, syncs them, and renames the folder to ``<output_dir>/checkpoint-N``.

Trust. Files of ours are JSON and safetensors, never pickles. transformers loads its own
(``optimizer.pt``, ``scheduler.pt``, ``rng_state*.pth``) with ``weights_only=True`` and never loads
``training_args.bin``; the folders of DCP (FSDP2) and DeepSpeed hold pickles that run code when
they are loaded. Nothing is loaded before the manifest matches: every listed file has its size and
hash, and no file that a loader would open was added. That finds damage, mixed-up files and partial
copies. It is no signature: who can write to the folder can write the manifest, too. Resume only
from folders that only you and those you trust can write to.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_fast.files import (
    all_files,
    probe_writable,
    sha256_of,
    sync_file,
    sync_folder,
    write_atomic,
)

if TYPE_CHECKING:
    from dpo_fast.reference.protocol import Reference

logger = logging.getLogger("dpo_fast")

MANIFEST = "manifest.json"
FORMAT = 1
REFERENCE_FILE = "reference.json"
_STAGING, _REPLACED = ".staging-", ".replaced-"
CONVERTED = ".converted-"  # what another engine reads of a checkpoint while it resumes
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_WRITE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENOENT,
}
# what torch.save's C++ writer says when the disk is full
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
# what a loader of transformers, PEFT, DCP or DeepSpeed opens, finds others by, or runs
_LOADED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".distcp", ".py"}
_LOADED_NAMES = {".metadata", "latest"}

__all__ = [
    "CheckpointError",
    "Skipped",
    "Stage",
    "clean_stages",
    "load_reference_state",
    "newest_complete_checkpoint",
    "probe_writable",
    "save_reference_state",
    "stage_checkpoint",
    "verify_checkpoint",
    "write_manifest",
]

StrPath = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Stage:
    """Where a checkpoint is written until it is whole.

    Attributes:
        run_dir: stands in for ``output_dir`` while transformers saves.
        folder: ``run_dir/checkpoint-N``, where the files go.
        final: ``output_dir/checkpoint-N``, where they will be found.
    """

    run_dir: Path
    folder: Path
    final: Path


@contextmanager
def stage_checkpoint(
    output_dir: StrPath,
    step: int,
    *,
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> Iterator[Stage]:
    """Write ``checkpoint-<step>`` aside; it appears whole when the context ends well.

    Leaving with an exception leaves no checkpoint and removes the stage. A checkpoint of the same
    step that is there already is replaced.

    Raises:
        OSError: the files cannot be written (full disk, quota, permissions); older checkpoints are
            untouched.

    Args:
        output_dir: the run's folder, on storage that all ranks share.
        step: N.
        is_main: the rank that prepares, hashes and renames.
        barrier: waits for all ranks.
    """
    run = Path(output_dir).absolute()
    stage_dir = run / f"{_STAGING}checkpoint-{step}"
    stage = Stage(stage_dir, stage_dir / f"checkpoint-{step}", run / f"checkpoint-{step}")
    try:
        if is_main:
            clean_stages(run)
            stage.folder.mkdir(parents=True)
        barrier()
        yield stage
        barrier()
        if is_main:
            _commit(stage)
        barrier()
    except Exception as error:
        if not is_write_error(error):
            raise
        raise _cannot_write(stage, error) from error
    finally:
        if is_main:
            shutil.rmtree(stage_dir, ignore_errors=True)


def is_write_error(error: Exception) -> bool:
    """Whether a file could not be written; safetensors and torch.save have errors of their own."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return error.errno in _WRITE_ERRORS
    if isinstance(error, SafetensorError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_SAVE)


def _cannot_write(stage: Stage, error: Exception) -> OSError:
    usage = shutil.disk_usage(stage.final.parent)
    written = sum(path.stat().st_size for path in all_files(stage.run_dir))
    number = error.errno if isinstance(error, OSError) else None
    return OSError(
        number or errno.EIO,
        f"{stage.final} could not be written: {error}. {usage.free / 2**20:,.0f} MiB were free "
        f"after {written / 2**20:,.0f} MiB of it. Older checkpoints are untouched. Make room, or "
        "set save_total_limit, save_only_model or another output_dir, and start again with "
        "resume_from_checkpoint=True",
    )


def _commit(stage: Stage) -> None:
    write_manifest(stage.folder)
    for path in [stage.folder, *(p for p in stage.folder.rglob("*") if p.is_dir())]:
        sync_folder(path)
    replaced = stage.final.with_name(f"{_REPLACED}{stage.final.name}")
    if stage.final.exists():
        # two renames: clean_stages undoes the first one if a kill comes in between
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(stage.final, replaced)
    os.rename(stage.folder, stage.final)
    sync_folder(stage.final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_manifest(folder: StrPath) -> None:
    """Sync every file below ``folder`` and list size and SHA-256 of each in ``manifest.json``."""
    root = Path(folder)
    paths = [path for path in all_files(root) if path != root / MANIFEST]

    def entry(path: Path) -> tuple[str, dict[str, Any]]:
        sync_file(path)
        described = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        return path.relative_to(root).as_posix(), described

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        files = dict(pool.map(entry, paths))
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    write_atomic(root / MANIFEST, text.encode())


def verify_checkpoint(folder: StrPath, *, hashes: bool = True) -> None:
    """Raise unless ``folder`` holds what its manifest lists, and nothing else that is loaded.

    Notes, plots and the like may be added; weights, pickles and code may not.

    Args:
        hashes: also read and hash every file (about 2 GB/s a core); else sizes only.

    Raises:
        CheckpointError: the manifest is missing or unreadable; a file is missing, has another size
            or another hash, or was added; names it.
    """
    root = Path(folder)
    files = _read_manifest(root)
    for path in all_files(root):
        name = path.relative_to(root).as_posix()
        if name not in files and (path.suffix in _LOADED_SUFFIXES or path.name in _LOADED_NAMES):
            raise CheckpointError(
                f"{root}: {name} is not in {MANIFEST}: it was added after the checkpoint was "
                "written, and would be loaded with it. Move it out of the folder"
            )
    for name, expected in files.items():
        path = root / name
        if not path.is_file():
            raise CheckpointError(f"{root}: {name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{root}: {name} has {size} bytes instead of {expected['bytes']}")
    if not hashes:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        actual = pool.map(lambda name: sha256_of(root / name), files)
        for (name, expected), digest in zip(files.items(), actual, strict=True):
            if digest != expected["sha256"]:
                raise CheckpointError(f"{root}: {name} was changed or damaged (SHA-256 differs)")


def _read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        return {str(name): dict(entry) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        reason = f"{MANIFEST} is missing: written by another program, or incomplete"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = f"{MANIFEST} cannot be read ({error})"
    raise CheckpointError(f"{root}: {reason}")


class Skipped(NamedTuple):
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


def newest_complete_checkpoint(output_dir: StrPath) -> tuple[Path | None, list[Skipped]]:
    """The whole checkpoint with the highest step, and the higher ones that are not.

    Remains of interrupted saves are cleaned up first. Only call it while nobody writes there.
    """
    run = Path(output_dir)
    if not run.is_dir():
        return None, []
    clean_stages(run)
    skipped = []
    for folder in sorted(_checkpoints(run), key=_step, reverse=True):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            skipped.append(Skipped(folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def _checkpoints(run: Path) -> list[Path]:
    return [p for p in run.iterdir() if p.is_dir() and _CHECKPOINT.match(p.name)]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def clean_stages(output_dir: StrPath) -> list[Path]:
    """Remove what interrupted saves left; put back a checkpoint that was about to be replaced."""
    run = Path(output_dir)
    removed = []
    for replaced in run.glob(f"{_REPLACED}checkpoint-*"):
        final = run / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            os.rename(replaced, final)
            sync_folder(run)
    for rest in (
        p for kind in (_STAGING, _REPLACED, CONVERTED) for p in run.glob(f"{kind}checkpoint-*")
    ):
        shutil.rmtree(rest, ignore_errors=True)
        removed.append(rest)
    return removed


def save_reference_state(
    folder: StrPath, reference: "Reference | None", *, rank: int = 0, ranks: int = 1
) -> None:
    """Write strategy and fingerprint, and what has moved, into a checkpoint's folder.

    Called on every rank: each writes the shards that it has, rank 0 everything else.
    """
    from dpo_fast.reference.stored import write_state

    root = Path(folder)
    about: dict[str, Any] = {"format": FORMAT, "name": "none", "fingerprint": None}
    if reference is not None:
        state = reference.state_dict()
        write_state(root, state, rank=rank, ranks=ranks)
        about |= {
            "name": reference.name,
            "fingerprint": reference.fingerprint(),
            "state": bool(state),
        }
    if rank == 0:
        (root / REFERENCE_FILE).write_text(json.dumps(about, indent=1))


def load_reference_state(folder: StrPath, reference: "Reference | None") -> None:
    """Check that a checkpoint was trained against ``reference``, and move it to where it was.

    A checkpoint may be resumed with another strategy that answers with the same weights (frozen,
    adapter, precomputed).

    Raises:
        CheckpointError: another reference (both fingerprints are named), one that moved against
        one that
            does not, or a checkpoint without a reference file.
    """
    root = Path(folder)
    path = root / REFERENCE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{root}: {REFERENCE_FILE} is missing, so nothing says against which reference it was "
            "trained: it was not written by dpo_fast. Start from its weights as a model instead "
            "of resuming."
        )
    about = json.loads(path.read_text())
    name = "none" if reference is None else reference.name
    if (about["name"] == "none") != (reference is None):
        raise CheckpointError(
            f"{root}: trained with reference={about['name']!r}, resumed with {name!r}: set "
            f"reference={about['name']!r}, or start a new run."
        )
    if reference is None:
        return
    own = reference.fingerprint()
    stored = about["fingerprint"]
    if stored != own and stored.partition("-")[0] == own.partition("-")[0]:
        raise CheckpointError(
            f"{root}: the reference has the weights that the run was started with, but other "
            f"settings ({stored} against {own}): its config or adapter config was changed, or "
            "another version of transformers or PEFT added a setting. Resume with the settings "
            "and versions of the start."
        )
    if stored != own:
        raise CheckpointError(
            f"{root}: trained against the reference {stored} ({about['name']}), "
            f"this run's is {own} ({name}): give the model (and ref_model) that the run was "
            "started with, or start a new run."
        )
    reference.load_state_dict(_stored_parts(root, reference) if about["state"] else {})


def _stored_parts(root: Path, reference: "Reference") -> dict[str, Any]:
    """The stored state, of sharded tensors what this rank has of them."""
    import torch

    from dpo_fast.reference.stored import StoredState

    own, stored = reference.state_dict(), StoredState(root)
    return {
        name: stored.part_like(name, own[name]) if name in own else torch.empty(0)
        for name in stored.shapes
    }
