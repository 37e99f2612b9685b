"""FastDPOTrainer on two processes takes the steps of TRL's trainer on two, and of one process."""

from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.trl_cells import CELLS
from tests.trainer.parity import Run, assert_same_log, relative_update_error

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="gloo: not in this torch"
)
OURS = [f"{name}/{layout}" for name, (_, layouts) in CELLS.items() for layout in layouts]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks left."""
    spec = {"engine": "ddp", "ranks": 2, "cells": list(CELLS)}
    return launch(2, "trl_cells", spec, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without a launcher left."""
    spec = {"engine": "ddp", "ranks": 1, "cells": ["frozen"]}
    return launch(1, "trl_cells", spec, tmp_path_factory.mktemp("one"), alone=True)[0]


def run_of(cell: dict[str, Any]) -> Run:
    return Run(cell["before"], cell["after"], cell["log"], None)


@pytest.mark.parametrize("cell", OURS)
def test_the_steps_of_trl_on_as_many_ranks(ranks: list[dict[str, Any]], cell: str) -> None:
    ours, theirs = run_of(ranks[0][cell]), run_of(ranks[0][f"{cell.split('/')[0]}/trl"])
    assert len(ours.log) == 5
    assert_same_log(ours, theirs)
    assert relative_update_error(ours, theirs) <= 1e-3


@pytest.mark.parametrize("cell", OURS)
def test_ranks_end_with_the_same_weights(ranks: list[dict[str, Any]], cell: str) -> None:
    first, second = (rank[cell]["after"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", CELLS["frozen"][1])
def test_the_steps_of_one_process(
    ranks: list[dict[str, Any]], one: dict[str, Any], layout: str
) -> None:
    two, single = run_of(ranks[0][f"frozen/{layout}"]), run_of(one[f"frozen/{layout}"])
    assert_same_log(two, single)
    assert relative_update_error(two, single) <= 1e-3
