"""A reference's state in files of shards: written by some ranks, read by others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_fast.functional.ema_shards import local_of
from dpo_fast.reference.stored import StoredState, write_state

WHOLE = {"rows": torch.randn(7, 3), "short": torch.randn(2), "half": torch.randn(5).bfloat16()}


def partition(whole: Tensor, rank: int, ranks: int) -> Any:
    """What ZeRO-3 makes of a parameter: an empty tensor with a padded part of the flattened one."""
    size = -(-whole.numel() // ranks)
    padded = whole.new_zeros(size * ranks)
    padded[: whole.numel()] = whole.flatten()
    part: Any = padded[rank * size : (rank + 1) * size].clone()
    part.ds_numel = size
    param: Any = whole.new_empty(0)
    param.ds_tensor, param.ds_numel, param.ds_shape = part, whole.numel(), whole.shape
    param.ds_process_group = (rank, ranks)
    return param


@pytest.fixture(autouse=True)
def _groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group[0])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group[1])


def write(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        parts = {name: partition(whole, rank, ranks) for name, whole in WHOLE.items()}
        write_state(folder, {**parts, "updates": torch.tensor(4)}, rank=rank, ranks=ranks)


@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_read_by_any_number_of_ranks(readers: int, tmp_path: Path) -> None:
    write(tmp_path, 3)
    stored = StoredState(tmp_path)
    assert stored.shapes == {n: t.shape for n, t in WHOLE.items()} | {"updates": torch.Size([])}
    assert int(stored.part_like("updates", torch.tensor(0))) == 4
    for rank in range(readers):
        for name, whole in WHOLE.items():
            param = partition(whole, rank, readers)
            found = stored.part_like(name, param)
            assert found.dtype == whole.dtype and torch.equal(found, local_of(param))
    for name, whole in WHOLE.items():
        assert torch.equal(stored.part_like(name, torch.empty_like(whole)), whole)


def test_whole_tensors_read_by_ranks(tmp_path: Path) -> None:
    write_state(tmp_path, WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]
    stored = StoredState(tmp_path)
    for rank in range(2):
        for name, whole in WHOLE.items():
            param = partition(whole, rank, 2)
            assert torch.equal(stored.part_like(name, param), local_of(param))


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "reference-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="by 3 ranks, and the files of 2"):
        StoredState(tmp_path)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path, WHOLE)
    with pytest.raises(ValueError, match=r"'rows' is \(7, 3\), this run's \(7, 4\)"):
        StoredState(tmp_path).part_like("rows", torch.empty(7, 4))
