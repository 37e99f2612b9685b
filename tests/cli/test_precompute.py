"""`dpo-fast precompute`: the second call computes nothing, and training finds all of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_fast.cli import main
from dpo_fast.reference import precomputed
from tests.cli.words import base_words, read_lines


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each pass over a data set had to compute."""
    counts: list[int] = []
    real = precomputed.compute_missing

    def counting(*args: Any) -> int:
        counts.append(real(*args))
        return counts[-1]

    monkeypatch.setattr(precomputed, "compute_missing", counting)
    return counts


def test_twice_then_train(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], computed: list[int]
) -> None:
    options = {
        "ref_cache_dir": tmp_path / "cache",
        "eval_dataset_name": material / "eval.jsonl",
        "eval_strategy": "steps",
    }
    words = base_words(material, tmp_path / "never", **options)
    assert main(["precompute", *words]) == 0
    first = capsys.readouterr().out
    assert "train: 12 pairs, 12 computed, 0 found\neval: 4 pairs, 4 computed, 0 found" in first
    assert str(tmp_path / "cache") in first and computed == [12, 4]
    assert not (tmp_path / "never").exists()

    other = {"learning_rate": 1e-4, "per_device_train_batch_size": 3, "beta": 0.5}
    assert main(["precompute", *words, *base_words(material, tmp_path, **options, **other)]) == 0
    second = capsys.readouterr().out
    assert "train: 12 pairs, 0 computed, 12 found\neval: 4 pairs, 0 computed, 4 found" in second
    assert computed == [12, 4]

    run = base_words(material, tmp_path / "run", **options, reference="precomputed")
    assert main(["train", *run]) == 0
    assert computed == [12, 4]
    online = base_words(material, tmp_path / "online", **options)
    assert main(["train", *online]) == 0
    losses = [
        [log["loss"] for log in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in log]
        for name in ("run", "online")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_other_weights_other_rows(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = base_words(material, tmp_path, ref_cache_dir=tmp_path / "cache")
    assert main(["precompute", *words]) == 0
    other = [*words, "--ref_model_name_or_path", str(material / "other")]
    assert main(["precompute", *other]) == 0
    assert "12 computed, 0 found" in capsys.readouterr().out.splitlines()[-3]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "frozen"], "never reads precomputed"),
        (["--loss_type", "simpo"], "needs no reference"),
        (["--sync_ref_model"], "name two references"),
        (["--streaming"], "stream"),
    ],
)
def test_refused_before_loading(
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("dpo_fast.trainer.setup.load_model", None)
    assert main(["precompute", *base_words(material, tmp_path), *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_as_a_process(material: Path, tmp_path: Path) -> None:
    """The whole way through the interpreter, as a launcher starts it."""
    words = base_words(material, tmp_path, ref_cache_dir=tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "dpo_fast.cli", "precompute", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train: 12 pairs, 12 computed, 0 found\ncache: ")
    assert "Traceback" not in done.stderr and "it/s" not in done.stderr
    assert "deprecated" not in done.stderr, done.stderr
