"""One of two ranks fails: the other ends with its reason, and the run goes on afterwards."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import STEPS, train_rank
from tests.faults.kills import assert_nothing_partial, result_of
from tests.nursery import PATIENCE, Child, ends, launch


def both(folder: Path, trouble: list[Any], **overrides: Any) -> list[Child]:
    return launch(folder, 2, train_rank, "ema", str(folder), trouble, overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks come to when nothing happens to them."""
    folder = tmp_path_factory.mktemp("whole")
    children = both(folder, [])
    assert ends(children) == [0, 0], [child.text() for child in children]
    return result_of(folder)


@pytest.fixture(scope="module")
def whole_of_fsdp2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same under FSDP2: each rank writes its shards of everything."""
    folder = tmp_path_factory.mktemp("whole_of_fsdp2")
    children = both(folder, [], fsdp2=True)
    assert ends(children) == [0, 0], [child.text() for child in children]
    found = result_of(folder)
    assert any(name.startswith("pytorch_model_fsdp_0/") for name in found["files"])
    assert "reference-00001-of-00002.safetensors" in found["files"]
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_and_started_again(tmp_path: Path, whole: dict[str, Any], rank: int) -> None:
    children = both(tmp_path, ["kill", rank, 5])
    codes = ends(children)
    assert codes[rank] == -9 and codes[1 - rank] == 1
    text = children[1 - rank].text()
    # rank 0 keeps the store of a launch without torchrun: with it goes the roll-call
    gone = "the store that all ranks share" if rank == 0 else "rank 1 of 2 died without a word"
    assert "RankError" in text and gone in text and "resume_from_checkpoint=True" in text
    assert_nothing_partial(tmp_path)
    again = both(tmp_path, [])
    assert ends(again) == [0, 0], [child.text() for child in again]
    assert result_of(tmp_path) == whole


@pytest.mark.parametrize("step", [3, 4])
def test_killed_under_fsdp2(tmp_path: Path, whole_of_fsdp2: dict[str, Any], step: int) -> None:
    """Between two checkpoints, and when the step of one is done: the shards of weights, optimizer
    and moved reference come back.
    """
    children = both(tmp_path, ["kill", 1, step], fsdp2=True)
    codes = ends(children)
    assert codes[1] == -9 and codes[0] == 1
    text = children[0].text()
    assert "RankError" in text and "rank 1 of 2 died without a word" in text
    assert_nothing_partial(tmp_path)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    again = both(tmp_path, [], fsdp2=True)
    assert ends(again) == [0, 0], [child.text() for child in again]
    assert result_of(tmp_path) == whole_of_fsdp2


def test_an_error_of_one_rank_is_the_others_reason(tmp_path: Path) -> None:
    children = both(tmp_path, ["raise", 1, 3])
    assert ends(children) == [1, 1]
    reason = "rank 1 of 2: ValueError: the reader of this rank found no more disks"
    assert "RankError" in children[0].text() and reason in children[0].text()
    assert "RankError" not in children[1].text()


def test_a_checkpoint_that_rank_0_cannot_finish(tmp_path: Path) -> None:
    children = both(tmp_path, ["disk full", 0, 4])
    assert ends(children) == [1, 1]
    assert "checkpoint-4 could not be written" in children[0].text()
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]


def test_nan_in_one_rank(tmp_path: Path) -> None:
    """The loss of rank 1 alone is NaN; both end, and the message is about the loss."""
    children = both(tmp_path, ["nan", 1, 2], save_strategy="no")
    assert ends(children) == [1, 1]
    for child in children:
        assert "FloatingPointError" in child.text() and "at step 3 on rank 1" in child.text()
    assert f"'global_step': {STEPS}" not in children[0].text()


def test_torchruns_summary_names_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "tests.faults.torchrun_script", str(tmp_path)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=env, check=False
    )
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in summary and "found no more disks" in summary
