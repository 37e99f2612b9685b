"""Checkpoints of sharded runs: resumed on as many ranks bit for bit, on others within rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import has_deepspeed, launch
from tests.trainer.parity import METRICS

CELLS = [("frozen", "shared_prefix"), ("adapter", "packed"), ("ema", "packed")]


def run(engine: str, ranks: int, folder: Path, *, resume: bool, cells: Any = CELLS) -> Any:
    spec = {
        "engine": engine,
        "ranks": ranks,
        "cells": cells,
        "folder": str(folder),
        "resume": resume,
    }
    return launch(ranks, "resume_cells", spec, folder / f"{engine}{ranks}{resume}")[0]


def assert_same(resumed: Any, whole: Any, tolerance: float) -> None:
    """Weights, reference and the metrics of the last steps."""
    for strategy, one in whole.items():
        for kind in ("after", "reference"):
            for name, tensor in one.get(kind, {}).items():
                other = resumed[strategy][kind][name]
                torch.testing.assert_close(other, tensor, rtol=tolerance, atol=tolerance)
        assert len(resumed[strategy]["log"]) == len(one["log"]) == 6
        for mine, expected in zip(resumed[strategy]["log"], one["log"], strict=True):
            for key in METRICS:
                bound = tolerance * max(1.0, abs(expected[key])) * (10 if key == "grad_norm" else 1)
                assert abs(mine[key] - expected[key]) <= bound, (strategy, key)


def test_fsdp2(tmp_path: Path) -> None:
    whole = run("fsdp2", 2, tmp_path, resume=False)
    saved = tmp_path / "ema" / "run" / "checkpoint-3"
    shards = sorted(path.name for path in saved.glob("reference*"))
    assert shards == [
        "reference-00000-of-00002.safetensors",
        "reference-00001-of-00002.safetensors",
        "reference.json",
    ]
    size = sum((saved / name).stat().st_size for name in shards[:2])
    assert max((saved / name).stat().st_size for name in shards[:2]) < 0.6 * size
    assert_same(run("fsdp2", 2, tmp_path, resume=True), whole, 0.0)
    assert_same(run("fsdp2", 1, tmp_path, resume=True), whole, 1e-4)


@pytest.mark.skipif(not has_deepspeed(), reason="deepspeed: not installed (make test does)")
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero(tmp_path: Path, engine: str) -> None:
    """DeepSpeed cuts its states by rank; for another number they are converted and cut anew."""
    whole = run(engine, 2, tmp_path, resume=False)
    saved = tmp_path / "ema" / "run" / "checkpoint-3"
    shards = len(list(saved.glob("reference-*-of-00002.safetensors")))
    assert shards == (2 if engine == "zero3" else 0)
    assert_same(run(engine, 2, tmp_path, resume=True), whole, 0.0)
    before = sorted(path.relative_to(saved) for path in saved.rglob("*"))
    assert_same(run(engine, 1, tmp_path, resume=True), whole, 1e-4)
    assert sorted(path.relative_to(saved) for path in saved.rglob("*")) == before
    assert not list((tmp_path / "ema" / "resumed1").glob(".converted-*"))


@pytest.mark.skipif(not has_deepspeed(), reason="deepspeed: not installed (make test does)")
def test_zero3_on_more_ranks(tmp_path: Path) -> None:
    cells = [("adapter", "packed"), ("ema", "shared_prefix")]
    whole = run("zero3", 1, tmp_path, resume=False, cells=cells)
    assert_same(run("zero3", 2, tmp_path, resume=True, cells=cells), whole, 1e-4)
