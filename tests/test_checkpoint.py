"""Checkpoints: whole or not there, named when damaged, and bound to their reference."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from dpo_fast import checkpoint as module
from dpo_fast.checkpoint import (
    CheckpointError,
    clean_stages,
    load_reference_state,
    newest_complete_checkpoint,
    save_reference_state,
    stage_checkpoint,
    verify_checkpoint,
    write_manifest,
)
from dpo_fast.reference.ema import EmaReference
from dpo_fast.reference.frozen import FrozenReference
from tests.reference.common import perturb
from tests.tiny import tiny_model


def save(run: Path, step: int, content: str = "weights") -> None:
    with stage_checkpoint(run, step) as stage:
        (stage.folder / "model.safetensors").write_text(content * 100)
        (stage.folder / "rank0").mkdir()
        (stage.folder / "rank0" / "optimizer.pt").write_text(f"{content} {step}")


def test_a_stage_is_invisible_until_it_is_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with stage_checkpoint(tmp_path, 2) as stage:
        (stage.folder / "model.safetensors").write_text("x")
        assert stage.final == tmp_path / "checkpoint-2" and not stage.final.exists()
        assert stage.folder == stage.run_dir / "checkpoint-2"
        assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
        assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]
    verify_checkpoint(tmp_path / "checkpoint-2")


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    save(tmp_path, 1, "abc")
    files = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())["files"]
    assert list(files) == ["model.safetensors", "rank0/optimizer.pt"]
    assert files["rank0/optimizer.pt"]["bytes"] == 5
    # printf 'abc 1' | sha256sum
    assert files["rank0/optimizer.pt"]["sha256"].startswith("aadfaaf99b89a1b6882a2971ba8c6a42")


def test_an_error_leaves_no_checkpoint_and_no_stage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), stage_checkpoint(tmp_path, 2) as stage:
        (stage.folder / "model.safetensors").write_text("x")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_step_saved_twice_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    save(tmp_path, 5, "new")
    assert (tmp_path / "checkpoint-5" / "rank0" / "optimizer.pt").read_text() == "new 5"
    assert os.listdir(tmp_path) == ["checkpoint-5"]
    verify_checkpoint(tmp_path / "checkpoint-5")


def test_only_the_main_rank_prepares_and_commits(tmp_path: Path) -> None:
    waited: list[str] = []
    with stage_checkpoint(tmp_path, 3) as main:
        with stage_checkpoint(
            tmp_path, 3, is_main=False, barrier=lambda: waited.append("x")
        ) as other:
            assert other == main
            (other.folder / "rank1").write_text("x")
        assert len(waited) == 3 and not main.final.exists()
        (main.folder / "rank0").write_text("x")
    names = sorted(p.name for p in main.final.iterdir())
    assert names == ["manifest.json", "rank0", "rank1"]


# -- damage
# ------------------------------------------------------------------------------------------


def missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def changed(folder: Path) -> None:
    path = folder / "rank0" / "optimizer.pt"
    path.write_bytes(b"X" + path.read_bytes()[1:])


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def broken_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {"a')


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, r"model\.safetensors is missing"),
        (truncated, r"model\.safetensors has 699 bytes instead of 700"),
        (changed, r"rank0/optimizer\.pt was changed or damaged"),
        (no_manifest, r"manifest\.json is missing: written by another program, or incomplete"),
        (broken_manifest, r"manifest\.json cannot be read"),
        (empty_manifest, r"manifest\.json cannot be read"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    for step in (9, 10, 11):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-11")
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(tmp_path / "checkpoint-11")
    newest, skipped = newest_complete_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-10"
    assert [s.path for s in skipped] == [tmp_path / "checkpoint-11"]
    assert "checkpoint-11" in skipped[0].reason


def test_sizes_alone_are_checked_without_reading(tmp_path: Path) -> None:
    save(tmp_path, 1)
    changed(tmp_path / "checkpoint-1")
    verify_checkpoint(tmp_path / "checkpoint-1", hashes=False)
    truncated(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        verify_checkpoint(tmp_path / "checkpoint-1", hashes=False)


def test_steps_are_compared_as_numbers_and_others_ignored(tmp_path: Path) -> None:
    for step in (9, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", [])
    assert newest_complete_checkpoint(tmp_path / "nowhere") == (None, [])
    assert newest_complete_checkpoint(tmp_path / "runs") == (None, [])


def test_files_added_later_do_not_matter(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "notes.txt").write_text("x")
    verify_checkpoint(tmp_path / "checkpoint-1")


# -- SIGKILL
# -----------------------------------------------------------------------------------------


def dies_at(owner: Any, name: str, n: int, *, after: bool = False) -> None:
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def killed_while_saving(run: Path, step: int, arm: Callable[[], None]) -> None:
    def work() -> None:
        arm()
        save(run, step, "second")

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


BEFORE: dict[str, Callable[[], None]] = {
    "while files are written": lambda: dies_at(Path, "write_text", 2),
    "while they are hashed": lambda: dies_at(module, "sha256_of", 2),
    "before the manifest": lambda: dies_at(module, "write_atomic", 1),
    "before the folders are synced": lambda: dies_at(module, "sync_folder", 1),
    "before the rename": lambda: dies_at(os, "rename", 1),
}


@pytest.mark.parametrize("moment", BEFORE)
def test_killed_while_saving_the_previous_one_counts(tmp_path: Path, moment: str) -> None:
    save(tmp_path, 1)
    killed_while_saving(tmp_path, 2, BEFORE[moment])
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-1", [])
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    save(tmp_path, 2)
    assert newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


def test_killed_after_the_rename_the_new_one_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    killed_while_saving(tmp_path, 2, lambda: dies_at(os, "rename", 1, after=True))
    assert newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("arm", "content"),
    [
        (lambda: dies_at(os, "rename", 1, after=True), "first 2"),
        (lambda: dies_at(os, "rename", 2), "first 2"),
        (lambda: dies_at(os, "rename", 2, after=True), "second 2"),
    ],
)
def test_killed_while_replacing_one_of_the_two_counts(
    tmp_path: Path, arm: Callable[[], None], content: str
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, "first")
    killed_while_saving(tmp_path, 2, arm)
    assert newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])
    found = (tmp_path / "checkpoint-2" / "rank0" / "optimizer.pt").read_text()
    assert found == content
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


def test_leftovers_of_any_step_are_cleaned_by_the_next_save(tmp_path: Path) -> None:
    killed_while_saving(tmp_path, 7, BEFORE["before the rename"])
    assert os.listdir(tmp_path) == [".staging-checkpoint-7"]
    save(tmp_path, 8)
    assert os.listdir(tmp_path) == ["checkpoint-8"]
    assert clean_stages(tmp_path) == []


# -- the reference in it
# -----------------------------------------------------------------------------


def ema(seed: int = 0, **kwargs: Any) -> tuple[Any, EmaReference]:
    policy = tiny_model(seed=seed)
    base = FrozenReference.copy_of(policy)
    return policy, EmaReference(base, policy, **{"alpha": 0.3, "every": 2, **kwargs})


def test_a_moving_reference_comes_back_bit_for_bit(tmp_path: Path) -> None:
    policy, reference = ema()
    for step in (1, 2, 3, 4):
        perturb(policy, seed=step)
        reference.on_step_end(step)
    save_reference_state(tmp_path, reference)
    _, again = ema()
    load_reference_state(tmp_path, again)
    assert again.updates == 2
    moved, own = reference.state_dict(), again.state_dict()
    assert moved.keys() == own.keys()
    assert all(torch.equal(moved[name], own[name]) for name in moved)
    assert sorted(os.listdir(tmp_path)) == ["reference.json", "reference.safetensors"]


def test_tied_weights_are_stored_once_and_come_back(tmp_path: Path) -> None:
    policy = tiny_model(tie_word_embeddings=True)
    reference = EmaReference(FrozenReference.copy_of(policy), policy, alpha=0.5, every=1)
    perturb(policy)
    reference.update()
    save_reference_state(tmp_path, reference)
    moved = reference.module.lm_head.weight.detach().clone()  # type: ignore[union-attr]
    perturb(policy, seed=3)
    reference.update()
    load_reference_state(tmp_path, reference)
    assert torch.equal(reference.module.lm_head.weight, moved)  # type: ignore[union-attr]


def test_a_fixed_reference_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    save_reference_state(tmp_path, FrozenReference.copy_of(tiny_model()))
    assert os.listdir(tmp_path) == ["reference.json"]
    load_reference_state(tmp_path, FrozenReference.copy_of(tiny_model()))
    other = FrozenReference.copy_of(tiny_model(seed=1))
    stored = json.loads((tmp_path / "reference.json").read_text())["fingerprint"]
    with pytest.raises(CheckpointError, match=f"{stored}.*{other.fingerprint()}.*started with"):
        load_reference_state(tmp_path, other)


def test_equal_weights_with_other_settings_are_told_apart(tmp_path: Path) -> None:
    save_reference_state(tmp_path, FrozenReference.copy_of(tiny_model()))
    other = FrozenReference.copy_of(tiny_model(rms_norm_eps=1e-3))
    with pytest.raises(CheckpointError, match=r"has the weights .* but other settings.*versions"):
        load_reference_state(tmp_path, other)


def test_strategies_that_do_not_fit_the_checkpoint_raise(tmp_path: Path) -> None:
    for name in "frozen", "moving", "none", "foreign":
        (tmp_path / name).mkdir()
    _, moving = ema()
    frozen = FrozenReference.copy_of(tiny_model())
    save_reference_state(tmp_path / "frozen", frozen)
    save_reference_state(tmp_path / "moving", moving)
    save_reference_state(tmp_path / "none", None)
    load_reference_state(tmp_path / "none", None)
    with pytest.raises(ValueError, match="written with reference='ema'"):
        load_reference_state(tmp_path / "moving", frozen)
    with pytest.raises(ValueError, match="checkpoint has none"):
        load_reference_state(tmp_path / "frozen", moving)
    with pytest.raises(
        CheckpointError, match="trained with reference='none', resumed with 'frozen'"
    ):
        load_reference_state(tmp_path / "none", frozen)
    with pytest.raises(CheckpointError, match="trained with reference='ema', resumed with 'none'"):
        load_reference_state(tmp_path / "moving", None)
    with pytest.raises(
        CheckpointError, match=r"reference\.json is missing.*not written by dpo_fast"
    ):
        load_reference_state(tmp_path / "foreign", frozen)


def test_a_damaged_reference_is_found_with_the_rest(tmp_path: Path) -> None:
    _, reference = ema()
    with stage_checkpoint(tmp_path, 1) as stage:
        save_reference_state(stage.folder, reference)
    path = tmp_path / "checkpoint-1" / "reference.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"reference\.safetensors was changed"):
        verify_checkpoint(tmp_path / "checkpoint-1")


def test_a_copied_folder_is_still_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "elsewhere")
    verify_checkpoint(tmp_path / "elsewhere")
    write_manifest(tmp_path / "elsewhere")
    verify_checkpoint(tmp_path / "elsewhere")
