"""Metrics of two real ranks: one process's values, one packed all-reduce a log step, no wait."""

import pytest
import torch

from dpo_fast.metrics import _FIELDS, MetricBuffer, MicroBatchSums, NonFinite, packed_numel
from tests.parallel.launch import run_ranks
from tests.parallel.metrics_worker import RUNS, trained
from tests.trainer.parity import METRICS, Run, relative_update_error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    return run_ranks("tests.parallel.metrics_worker:metrics_cells", 2, folder)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_log_and_train_what_one_does(ranks, name):
    one = trained(name, 1)
    for rank in ranks:
        found = rank[name]
        assert len(found["log"]) == len(one["log"]) > 0
        for ours, right in zip(found["log"], one["log"], strict=True):
            for key in METRICS:
                assert ours[key] == pytest.approx(right[key], rel=1e-5, abs=2e-6), key
        error = relative_update_error(
            *(Run(r["before"], r["after"], r["log"], None) for r in (found, one))
        )
        assert error < 1e-4


def test_nothing_between_log_steps(ranks):
    """Per micro-batch no collective but DDP's gradient reduction in a step's last; per step one
    exchange of two counts; per log step one packed all-reduce of ours, and transformers' gathers of
    one number a rank.
    """
    packed = 8 * packed_numel(2 * 3, 2)  # two steps of three micro-batches
    step = ["counts", *["micro-batch"] * 3, "log step?"]
    for rank in ranks:
        events = rank["counted"]
        first = next(i for i, (what, _) in enumerate(events) if what == "counts")
        last = max(i for i, (what, _) in enumerate(events) if what == "micro-batch") + 2
        assert [w for w, _ in events[first : last + 1] if w != "between"] == step * 4
        seen = dict.fromkeys(step, 0)
        for what, calls in events[first : last + 1]:
            if what == "between":
                assert calls == {}
                continue
            seen[what] += 1
            number = seen[what]
            if what == "counts":
                assert calls == {"allreduce_": [16]}
            elif what == "log step?":
                ours = {"allreduce_": [packed]}
                assert {k: v for k, v in calls.items() if "gather" not in k} == (
                    ours if number % 2 == 0 else {}
                )
                gathers = [size for k, v in calls.items() if "gather" in k for size in v]
                assert bool(gathers) == (number % 2 == 0) and set(gathers) <= {4}
            elif number % 3 == 0:  # DDP, in the first step also the order of its buckets
                assert set(calls) <= {"allreduce_", "broadcast_"}
                assert 1 <= len(calls["allreduce_"]) <= 2
            else:
                assert calls == {}, number


def test_a_nan_on_one_rank_ends_all_with_rank_and_step(ranks):
    for rank in ranks:
        error, step, left = rank["at the log"].split(" | ")
        # the step's gradients made the other rank's weights NaN as well
        assert "NaN or infinite at step 3 on rank 1, later on 1 more." in error
        assert step == "4" and left == "[]"


def test_no_checkpoint_holds_what_a_nan_made(ranks):
    for rank in ranks:
        error, step, left = rank["before a checkpoint"].split(" | ")
        assert "at step 3 on rank 1, later on 1 more." in error
        assert step == "4" and left == "[]"


def sums(loss_is_bad: bool = False) -> MicroBatchSums:
    device = torch.zeros(len(_FIELDS), dtype=torch.float64)
    device[_FIELDS.index("nonfinite")] = float(loss_is_bad)
    host = [0.0] * len(_FIELDS)
    host[_FIELDS.index("pairs")] = 2.0
    host[_FIELDS.index("num_tokens")] = 10.0
    return MicroBatchSums(device, host)


def test_the_first_bad_step_of_each_rank_is_named():
    buffer = MetricBuffer(lambda table: table, rank=1, num_ranks=3)
    for step, bad in ((5, False), (6, True), (6, False), (7, True)):
        buffer.add("train", sums(bad), step=step)
    assert buffer.nonfinite("train") == (NonFinite(1, 6),)
    popped = buffer.pop("train")
    assert popped is not None and popped[1].nonfinite == (NonFinite(1, 6),)
    assert buffer.nonfinite("train") == () and buffer.pop("train") is None


def test_ranks_that_see_the_same_pairs_count_them_once():
    """Tensor and sequence parallel groups: the sum over ranks holds each pair twice."""
    buffer = MetricBuffer(lambda table: 2 * table, num_ranks=2, copies=2)
    buffer.add("train", sums())
    metrics, counts = buffer.pop("train") or pytest.fail("nothing there")
    assert counts.pairs == 2 and counts.tokens == 10 and metrics["num_tokens"] == 10


def test_one_all_reduce_a_log_step():
    calls = []

    def reduce(table):
        calls.append(table.numel())
        return table

    buffer = MetricBuffer(reduce, num_ranks=4)
    for step in range(1, 8):
        buffer.add("train", sums(), step=step)
    buffer.pop("train")
    assert calls == [packed_numel(7, 4)]
