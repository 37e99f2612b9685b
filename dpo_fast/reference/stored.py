"""A reference's state on disk: every rank writes its shards, any number of ranks reads its own.

``reference.safetensors`` holds whole tensors, written by one rank. Where an engine has sharded the
model there is one file a rank instead, ``reference-00003-of-00008.safetensors``: each tensor as the
range of the flattened parameter that the rank has, with the range's start and the parameter's shape
in the file's header. A reader takes what overlaps with its own range, whatever the number of ranks
was; no tensor is ever gathered.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_fast.functional.ema_shards import (
    is_contiguous_shard,
    is_dtensor,
    is_sharded,
    local_of,
    shard_start,
    whole_shape,
)

WHOLE_FILE = "reference.safetensors"
_SHARD_FILES = "reference-*-of-*.safetensors"
_HEADER = "shards"


def write_state(
    folder: str | os.PathLike[str], state: Mapping[str, Tensor], *, rank: int = 0, ranks: int = 1
) -> None:
    """Write this rank's part of ``state`` into ``folder``; called on every rank.

    Sharded tensors are written by the ranks that hold them, others by rank 0.

    Raises:
        ValueError: a tensor is split along another dimension than its first.
    """
    root = Path(folder)
    if not any(map(is_sharded, state.values())):
        if rank == 0 and state:
            whole = {name: t.detach().cpu().contiguous() for name, t in state.items()}
            save_file(whole, root / WHOLE_FILE)
        return
    parts: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for name, tensor in state.items():
        if not is_contiguous_shard(tensor):
            raise ValueError(
                f"{name!r} is split as {tensor.placements}: only shards that are rows of the "  # type: ignore[attr-defined]
                "parameter can be stored. Use FSDP2 or ZeRO-3 without tensor parallelism."
            )
        if _is_writer(tensor, rank):
            parts[name] = local_of(tensor).detach().reshape(-1).cpu().contiguous()
            header[name] = [shard_start(tensor), list(whole_shape(tensor))]
    path = root / f"reference-{rank:05d}-of-{ranks:05d}.safetensors"
    save_file(parts, path, metadata={_HEADER: json.dumps(header)})


def _is_writer(tensor: Any, rank: int) -> bool:
    """Of several ranks with the same values (replicas), the first one."""
    if is_dtensor(tensor):
        mesh = tensor.device_mesh
        dims = enumerate(tensor.placements)
        return all(mesh.get_local_rank(d) == 0 for d, p in dims if p.is_replicate())
    return is_sharded(tensor) or rank == 0


class _Piece(NamedTuple):
    """A range of a flattened tensor in one file."""

    path: Path
    start: int
    size: int


class StoredState:
    """What :func:`write_state` left in a folder; tensors are read when they are asked for.

    Raises:
        ValueError: the files of some ranks are missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, torch.Size] = {}
        whole = root / WHOLE_FILE
        paths = sorted(root.glob(_SHARD_FILES)) or ([whole] if whole.is_file() else [])
        for path in paths:
            self._index(path)
        if paths and paths[0] != whole:
            expected = int(paths[0].stem.rpartition("-")[2])
            if len(paths) != expected:
                raise ValueError(
                    f"{root}: the reference was written by {expected} ranks, and the files of "
                    f"{len(paths)} are here: the checkpoint is not complete."
                )

    def _index(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            for name in file.keys():
                count = torch.Size(file.get_slice(name).get_shape()).numel()
                start, shape = header.get(name, (0, file.get_slice(name).get_shape()))
                self.shapes[name] = torch.Size(shape)
                self._pieces.setdefault(name, []).append(_Piece(path, start, count))

    def part_like(self, name: str, tensor: Tensor) -> Tensor:
        """The range of ``name`` that ``tensor`` has on this rank, in its local shape, on the host.

        Raises:
            ValueError: the whole shapes differ, or ranges are missing.
        """
        shape, own = self.shapes[name], whole_shape(tensor)
        if shape != own:
            raise ValueError(
                f"The stored reference's {name!r} is {tuple(shape)}, this run's {tuple(own)}: "
                "resume with the model of the checkpoint."
            )
        local = local_of(tensor)
        start, stop = shard_start(tensor), shard_start(tensor) + local.numel()
        found = []
        for piece in sorted(self._pieces[name], key=lambda piece: piece.start):
            first, last = max(start, piece.start), min(stop, piece.start + piece.size)
            if first < last:
                with safe_open(piece.path, framework="pt") as file:
                    flat = file.get_tensor(name).reshape(-1)
                found.append(flat[first - piece.start : last - piece.start])
        if sum(part.numel() for part in found) != local.numel():
            raise ValueError(f"The stored reference's {name!r} is not complete: {own} elements.")
        return torch.cat(found).view(local.shape) if found else torch.empty_like(local)
