"""Damaged, exchanged and added files of a checkpoint: found before anything is loaded."""

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_fast import checkpoint
from dpo_fast.checkpoint import CheckpointError, verify_checkpoint, write_manifest
from tests.faults.jobs import trainer_of


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints and a moved reference."""
    folder = tmp_path_factory.mktemp("run")
    trainer_of("ema", folder, max_steps=4).train()
    return folder


@pytest.fixture(scope="module")
def trainer(run_folder: Path) -> Any:
    """Resumes from that run; reused, since nothing may be loaded into it."""
    return trainer_of("ema", run_folder, max_steps=4)


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the last checkpoint that may be damaged."""
    return Path(shutil.copytree(run_folder / "run" / "checkpoint-4", tmp_path / "checkpoint-4"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every file that is loaded: pickles, safetensors, our JSON."""
    import safetensors.torch

    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(f"{name} {path}")
            return original(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(torch, "load")
    watch(safetensors.torch, "load_file")
    watch(pickle, "load")
    yield seen


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1 << random.Random(0).randrange(8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, truncate, extend, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_every_file_is_checked_before_anything_is_loaded(
    run_folder: Path, tmp_path: Path, trainer: Any, loads: list[str], damage: Any
) -> None:
    whole = run_folder / "run" / "checkpoint-4"
    names = sorted(p.name for p in whole.iterdir())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin"} <= set(names)
    assert {"reference.json", "reference.safetensors", "manifest.json"} <= set(names)
    for name in names:
        copy = Path(shutil.copytree(whole, tmp_path / damage.__name__ / name))
        damage(copy / name)
        if name == "manifest.json" and damage is extend:
            continue  # a byte after the JSON: unreadable below
        with pytest.raises(CheckpointError, match=r"checkpoint|manifest|" + name) as caught:
            trainer.train(resume_from_checkpoint=str(copy))
        assert name in str(caught.value)
    assert loads == []


@pytest.mark.parametrize(
    "name", ["scaler.pt", "adapter_model.bin", "global_step9/mp_rank_00.pt", "latest", "a.distcp"]
)
def test_files_that_were_added_are_not_loaded(
    folder: Path, trainer: Any, loads: list[str], name: str
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=rf"{name} is not in manifest.json.*Move it out"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert loads == []


def test_notes_may_be_added(folder: Path) -> None:
    for name in ("notes.txt", "curves.png", "eval.json"):
        (folder / name).write_text("x")
    verify_checkpoint(folder)


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_of_transformers_run_no_code_even_where_the_manifest_was_forged(
    folder: Path, run_folder: Path, tmp_path: Path, name: str
) -> None:
    boom = tmp_path / "boom"
    torch.save({"state": Bomb(boom)}, folder / name)
    write_manifest(folder)
    with pytest.raises(pickle.UnpicklingError, match=r"weights_only|Weights only"):
        trainer_of("ema", run_folder, max_steps=4).train(resume_from_checkpoint=str(folder))
    assert not boom.exists()
    torch.load(folder / name, weights_only=False)  # the bomb was a real one
    assert boom.exists()


def test_training_arguments_are_never_unpickled(
    folder: Path, run_folder: Path, tmp_path: Path, loads: list[str]
) -> None:
    boom = tmp_path / "boom"
    torch.save(Bomb(boom), folder / "training_args.bin")
    write_manifest(folder)
    trainer_of("ema", run_folder, max_steps=4).train(resume_from_checkpoint=str(folder))
    assert not boom.exists() and not any("training_args" in load for load in loads)
    assert any("optimizer.pt" in load for load in loads)


def test_files_of_ours_are_json_and_safetensors(run_folder: Path) -> None:
    from safetensors import safe_open

    final = run_folder / "run" / "checkpoint-4"
    for name in ("manifest.json", "reference.json"):
        json.loads((final / name).read_text())
    with safe_open(final / "reference.safetensors", framework="pt") as file:
        assert "updates" in file.keys()
    source = Path(checkpoint.__file__).parent
    pickles = [p for p in source.rglob("*.py") if "import pickle" in p.read_text()]
    assert pickles == []


def test_the_best_model_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    options = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    trainer = trainer_of("frozen", tmp_path, **options)
    original = trainer._load_best_model

    def damaged() -> None:
        flip(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        original()

    trainer._load_best_model = damaged
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        trainer.train()
