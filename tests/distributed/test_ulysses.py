"""The trainer under DeepSpeed's sequence parallelism: two ranks share each row, exchanging heads in
attention, and one process has the same losses, metrics and updates.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.launch import has_deepspeed, launch
from tests.distributed.ulysses_cells import EPOCH, FOUR, UNCLIPPED, trained
from tests.parallel.context_worker import make
from tests.trainer.parity import METRICS, Run, relative_update_error

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo: not in this torch"),
    pytest.mark.skipif(not has_deepspeed(), reason="deepspeed: not installed (make test does)"),
]
# engine, ranks that share a row, cells
TWO = [
    ("zero2", 2, ["frozen, sigmoid + sft", "frozen, ipo", "precomputed, accumulated", "adapter"]),
    ("zero3", 2, ["frozen, sigmoid + sft", "adapter", "moving"]),
]
CELLS = [(f"{engine}/{size}/{name}", name) for engine, size, names in TWO for name in names]
# Two groups of two ranks; and one of four, more than the model has key-value heads.
FOUR_RANKS = [
    ("zero2", 2, ["frozen, ipo"]),
    ("zero3", 2, ["frozen, ipo"]),
    ("zero2", 4, ["frozen, sigmoid + sft"]),
]
LAYERS, PROJECTIONS = 2, 4  # of the tiny model; query, key, value, and the answer's way back
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    spec = {"engine": "zero", "ranks": 2, "runs": TWO, "resumed": True}
    return launch(2, "ulysses_cells", spec, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    spec = {"engine": "zero", "ranks": 4, "runs": FOUR_RANKS, "resumed": False}
    return launch(4, "ulysses_cells", spec, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def one() -> Callable[[str], dict[str, Any]]:
    """The same cell in one process; each runs once."""
    done: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in done:
            done[name] = trained(make(name, **UNCLIPPED))
        return done[name]

    return of


def assert_same(
    found: dict[str, Any], right: dict[str, Any], metrics: tuple[str, ...] = METRICS
) -> None:
    """Metrics of each step within 1e-5, the whole update within 1e-4."""
    assert len(found["log"]) == len(right["log"]) > 1
    for ours, theirs in zip(found["log"], right["log"], strict=True):
        for key in metrics:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=2e-6), key
    runs = (Run(r["before"], r["after"], r["log"], None) for r in (found, right))
    assert relative_update_error(*runs) < 1e-4


def assert_same_evaluation(found: dict[str, Any], right: dict[str, Any]) -> None:
    """Of pairs: token metrics are means over micro-batches, and those of all ranks are one."""
    keys = [k for k in right["eval"] if k == "eval_loss" or "rewards" in k or "logps" in k]
    assert len(keys) == 7
    for key in keys:
        assert found["eval"][key] == pytest.approx(right["eval"][key], rel=1e-5, abs=2e-6), key


@pytest.mark.parametrize("cell,name", CELLS)
def test_two_ranks_train_as_one_process(cell: str, name: str, two: Ranks, one: Any) -> None:
    for found in (rank[cell] for rank in two):
        assert_same(found, one(name))
        assert_same_evaluation(found, one(name))


@pytest.mark.parametrize("cell,name", CELLS)
def test_each_rank_computes_half_of_the_positions(cell: str, name: str, two: Ranks) -> None:
    """Of the policy, and of a reference that is run, through DeepSpeed's all-to-all."""
    micro_batches = 6 if "accumulated" in name else 3
    models = 1 if "precomputed" in name else 2
    for found in (rank[cell] for rank in two):
        assert found["widths"] == [12] * micro_batches  # of 24, as max_length cuts the rows
        assert len(found["exchanges"]) == micro_batches * models * LAYERS * PROJECTIONS
        assert {shape[:3] for shape in found["exchanges"]} == {(2, 12, 8)}  # ranks, T / 2, 2P


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_groups_of_two_ranks(engine: str, four: Ranks) -> None:
    """Four ranks load one micro-batch each, and each group works through two of them a step.

    Token metrics are means over micro-batches, and those of both groups are one.
    """
    of_pairs = ("loss", "grad_norm", "num_tokens")
    metrics = tuple(k for k in METRICS if k in of_pairs or "rewards" in k or "logps" in k)
    right = trained(make("frozen, ipo", **FOUR, gradient_accumulation_steps=4))
    for found in (rank[f"{engine}/2/frozen, ipo"] for rank in four):
        assert_same(found, right, metrics)
        assert len(set(found["widths"])) > 1  # DeepSpeed gathered rows of several lengths


def test_more_ranks_than_key_value_heads(four: Ranks, one: Any) -> None:
    """DeepSpeed replicates the heads in training; evaluation finds them as they were."""
    right = one("frozen, sigmoid + sft")
    for found in (rank["zero2/4/frozen, sigmoid + sft"] for rank in four):
        assert found["widths"] == [6] * 3
        assert_same(found, right)
        assert_same_evaluation(found, right)


def test_a_run_goes_on_from_the_end_of_an_epoch(two: Ranks) -> None:
    right = trained(make("frozen, ipo", **EPOCH, max_steps=5))
    for found in (rank["resumed"] for rank in two):
        assert_same(found, right)


def test_a_checkpoint_from_within_an_epoch_is_refused(two: Ranks) -> None:
    for found in (rank["resumed"] for rank in two):
        assert "at step 2, within an epoch of 3 steps" in found["error"]
        assert "ignore_data_skip=True" in found["error"]
