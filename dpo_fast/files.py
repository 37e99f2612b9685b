"""Files that survive a kill: written aside, synced, renamed; and hashed in a manifest."""

import errno
import hashlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = ".tmp-"
_STALE_SECONDS = 24 * 3600


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the system can sync folders (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of ``path`` durable."""
    with open(path, "rb+" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """``path`` holds ``data`` entirely, or is as it was, whatever happens in between.

    Two writers do not disturb each other: each has a temporary file of its own, and the last rename
    counts.
    """
    temporary = path.parent / f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_stale_temporaries(folder: Path) -> list[str]:
    """Delete what killed writers left: of dead processes of this host, or a day old."""
    removed = []
    for path in folder.glob(f"{_TEMPORARY}*"):
        host, _, rest = path.name.removeprefix(_TEMPORARY).rpartition("-")[0].rpartition("-")
        dead = host == socket.gethostname() and rest.isdigit() and not is_alive(int(rest))
        try:
            stale = dead or time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # its writer has finished in the meantime
            continue
        if stale:
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def is_alive(pid: int) -> bool:
    """Whether a process of this host has that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes (about 2 GB/s with SHA instructions)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_files(folder: Path) -> Iterator[Path]:
    """Every file below ``folder``, in the order of their names."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def probe_writable(folder: str | os.PathLike[str], what: str = "output") -> Path:
    """Create ``folder`` if need be and write, sync and delete a small file in it.

    Called before hours of work whose result goes there.

    Args:
        what: how the message calls it, e.g. ``"output"``.

    Returns:
        The folder, absolute.

    Raises:
        PermissionError, OSError: as the system reported it, with folder and remedy in the message.
    """
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=_TEMPORARY) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(
            error.errno,
            f"The {what} folder {path} cannot be written ({error.strerror}): nothing was started. "
            "Choose another folder, or correct its owner, mode or free space",
        ) from error
    return path
