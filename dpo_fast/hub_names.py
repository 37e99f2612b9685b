"""Which strings are paths and which are names on the hub."""

from pathlib import Path


def looks_like_path(name: str) -> bool:
    """Hub names are ``name`` or ``owner/name``; everything else is meant as a path."""
    is_relative_or_home = name.startswith((".", "/", "~", "\\"))
    return is_relative_or_home or name.count("/") > 1 or name.endswith("/")


def local_name(name: str) -> str:
    """``name`` with ``~`` spelled out if that is there; hub names as they are."""
    path = Path(name).expanduser()
    return str(path) if path.exists() else name
