"""TR-DPO's update on shards: the bits of whole tensors, and no communication."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import has_deepspeed, launch

NEEDS_DEEPSPEED = pytest.mark.skipif(
    not has_deepspeed(), reason="deepspeed: not installed (make test does)"
)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_sharded_updates_have_the_bits_of_whole_ones(engine: str, tmp_path: Path) -> None:
    spec = {"engine": engine, "ranks": 2}
    checked = launch(2, "ema_bits", spec, tmp_path)
    assert checked == [{"stochastic": 3, "shadow": 3, "adapter": 3}] * 2


def resumed(engine: str, ranks: int, folder: Path, *, resume: bool) -> Any:
    spec = {"engine": engine, "ranks": ranks, "folder": str(folder), "resume": resume}
    return launch(ranks, "ema_resume", spec, folder / f"{ranks}{resume}")[0]


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_rounding_goes_on_where_the_checkpoint_left_it(engine: str, tmp_path: Path) -> None:
    """bf16 references: their shadows, or the number of the update that the random bits hang on."""
    whole = resumed(engine, 2, tmp_path, resume=False)
    again = resumed(engine, 2, tmp_path, resume=True)
    for case, expected in whole.items():
        found = again[case]
        assert found["updates"] == expected["updates"] == 4
        shards = [name for name in expected["files"] if name.endswith("-of-00002.safetensors")]
        assert len(shards) == 2, expected["files"]
        assert any(name.startswith("shadow.") for name in expected["reference"]) == (
            case == "shadow"
        )
        for kind in ("reference", "policy"):
            assert found[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                assert torch.equal(found[kind][name], tensor), (case, name)
