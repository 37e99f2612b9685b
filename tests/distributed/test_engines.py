"""Every strategy and layout on two and four ranks takes the steps of one process.

A launch loops over all cells of one engine; what a cell left is compared here.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.cells import LAYOUTS, OFFLOADED, STRATEGIES
from tests.distributed.launch import has_deepspeed, launch
from tests.trainer.cells import strategy_arguments
from tests.trainer.parity import Run, assert_same_log, relative_update_error

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="gloo: not in this torch"
)
ALL = [(strategy, layout) for strategy in STRATEGIES for layout in LAYOUTS]
ZERO3 = [cell for cell in ALL if cell[0] != "precomputed"]
ZERO2 = [("frozen", "packed"), ("ema", "packed")]
# One pair a rank, and shards that not every rank has a part of.
FOUR = [("frozen", "shared_prefix"), ("ema", "packed")]
BF16 = [("bf16", "shared_prefix"), ("bf16-adapter", "packed")]
WAITING = (OFFLOADED, "packed")
LAUNCHES: dict[str, tuple[int, list[tuple[str, Any]]]] = {
    "one": (1, [("single", ALL)]),
    "two": (2, [("ddp", ALL), ("fsdp2", [*ALL, *BF16, WAITING])]),
    "four": (4, [("fsdp2", FOUR)]),
    "zero": (2, [("zero3", [*ZERO3, WAITING]), ("zero2", ZERO2)]),
}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    not has_deepspeed(), reason="deepspeed: not installed (make test does)"
)
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """What rank 0 of a launch left, by engine and cell; each launch runs once."""
    done: dict[str, Results | AssertionError] = {}

    def of(name: str) -> Results:
        if name not in done:
            ranks, runs = LAUNCHES[name]
            spec = {"engine": runs[0][0], "ranks": ranks, "runs": runs}
            folder = tmp_path_factory.mktemp(name)
            try:
                done[name] = launch(ranks, "train_cells", spec, folder, alone=ranks == 1)[0]
            except AssertionError as failure:
                done[name] = failure
        found = done[name]
        if isinstance(found, AssertionError):
            raise found
        return found

    return of


def run_of(cell: dict[str, Any]) -> Run:
    return Run(cell["before"], cell["after"], cell["log"], None)


def assert_same(ours: dict[str, Any], one: dict[str, Any]) -> None:
    """Loss and metrics of each of five steps within 1e-5, the whole update within 1e-3."""
    assert_same_log(run_of(ours), run_of(one))
    assert len(ours["log"]) == 5
    assert relative_update_error(run_of(ours), run_of(one)) <= 1e-3
    for key, value in ours.get("eval", {}).items():
        if "rewards" in key or "logps" in key or key == "eval_loss":
            assert value == pytest.approx(one["eval"][key], rel=1e-5, abs=1e-5), key
    assert ("reference" in ours) == ("reference" in one)
    if "reference" in one:
        assert ours["reference"].keys() == one["reference"].keys()
        assert relative_move_error(ours["reference"], one["reference"]) <= 1e-3


def relative_move_error(ours: dict[str, Any], one: dict[str, Any]) -> float:
    """``|| reference - reference of one || / || how far that one has moved ||``."""
    reference = strategy_arguments("ema")[0]["ref_model"]
    start = {name: param.detach() for name, param in reference.named_parameters()}
    names = [f"ref.{name}" for name in start]
    error = torch.stack([(ours[name] - one[name]).norm() for name in names]).norm()
    moved = [(one[f"ref.{name}"] - tensor).norm() for name, tensor in start.items()]
    return float(error / torch.stack(moved).norm())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("strategy,layout", ALL)
def test_two_ranks(engine: str, strategy: str, layout: str, results: Any) -> None:
    cell = f"{strategy}/{layout}"
    assert_same(results("two")[f"{engine}/{cell}"], results("one")[f"single/{cell}"])


@pytest.mark.parametrize("strategy,layout", FOUR)
def test_four_ranks_of_fsdp2(strategy: str, layout: str, results: Any) -> None:
    cell = f"{strategy}/{layout}"
    assert_same(results("four")[f"fsdp2/{cell}"], results("one")[f"single/{cell}"])


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("strategy,layout", ZERO3)
def test_two_ranks_of_zero3(strategy: str, layout: str, results: Any) -> None:
    cell = f"{strategy}/{layout}"
    assert_same(results("zero")[f"zero3/{cell}"], results("one")[f"single/{cell}"])


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("strategy,layout", ZERO2)
def test_two_ranks_of_zero2(strategy: str, layout: str, results: Any) -> None:
    cell = f"{strategy}/{layout}"
    assert_same(results("zero")[f"zero2/{cell}"], results("one")[f"single/{cell}"])


@pytest.mark.parametrize(
    "name,engine", [("two", "fsdp2"), pytest.param("zero", "zero3", marks=NEEDS_DEEPSPEED)]
)
def test_a_reference_that_waits_on_the_host(name: str, engine: str, results: Any) -> None:
    ours = results(name)[f"{engine}/{OFFLOADED}/packed"]
    assert_same(ours, results("one")["single/frozen/packed"])


@pytest.mark.parametrize("strategy,layout", BF16)
def test_mixed_precision_starts_at_log_2(strategy: str, layout: str, results: Any) -> None:
    """The copy is run as the policy is, and its log-probs are not rounded on the way out."""
    log = results("two")[f"fsdp2/{strategy}/{layout}"]["log"]
    assert log[0]["rewards/margins"] == 0.0 and log[0]["logps/chosen"] < -20
    assert log[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert 0.0 < abs(log[1]["rewards/margins"]) < 10.0
    assert len({entry["rewards/margins"] for entry in log}) == 5


def test_evaluated_before_training(results: Any) -> None:
    """Under FSDP2, too, where accelerate would want an optimizer first."""
    for engine in ("ddp", "fsdp2"):
        assert "eval_rewards/margins" in results("two")[f"{engine}/frozen/packed"]["eval"]


def test_the_references_of_the_table_differ_and_move(results: Any) -> None:
    """The comparison would pass with references that do nothing."""
    one = results("one")
    losses = [one[f"single/{strategy}/padded"]["log"][-1]["loss"] for strategy in STRATEGIES]
    assert abs(losses[0] - losses[1]) > 1e-2 and abs(losses[0] - losses[3]) > 1e-2
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    before, moved = (one["single/ema/padded"][kind] for kind in ("before", "reference"))
    assert all(not torch.equal(moved[f"ref.{name}"], tensor) for name, tensor in before.items())
