"""A DeepSpeed checkpoint of another number of ranks that cannot be converted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_fast.checkpoint import CheckpointError, clean_stages
from dpo_fast.trainer import zero_checkpoint


def accelerator(**config: Any) -> Any:
    plugin = SimpleNamespace(deepspeed_config=config, hf_ds_config=SimpleNamespace(config=config))
    return SimpleNamespace(num_processes=1, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    (folder / "global_step3").mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    for rank in range(2):
        (folder / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return folder


def test_no_room(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(checkpoint: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zero_checkpoint, "convert", full)
    run = accelerator()
    rule = (
        r"written by 2 ranks .* has 1, .*No space left on device.*resume on 2 ranks, or make room"
    )
    with (
        pytest.raises(CheckpointError, match=rule),
        zero_checkpoint.readable_checkpoint(str(saved), run, str(saved.parent)),
    ):
        pass
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint-3"]
    assert run.state.deepspeed_plugin.deepspeed_config == {}


def test_as_it_is_where_the_run_converts_itself(saved: Path) -> None:
    run = accelerator(checkpoint={"load_universal": True})
    with zero_checkpoint.readable_checkpoint(str(saved), run, str(saved.parent)) as path:
        assert path == str(saved)


def test_remains_of_a_killed_resume_are_cleaned_up(saved: Path) -> None:
    rest = saved.parent / ".converted-checkpoint-3"
    rest.mkdir()
    (rest / "latest").symlink_to(saved / "latest")
    assert clean_stages(saved.parent) == [rest]
    assert (saved / "latest").read_text() == "global_step3"
