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
    """Per micro-batch no collective but DDP's one gradient reduction in the last of a step; per
    step one exchange of two counts; per log line one all-reduce of ours.
    """
    for rank in ranks:
        events = [event for event in rank["counted"] if event["what"] != "log"]
        # four steps: the counts of a step, then its three micro-batches
        assert [e["what"] for e in events] == ["counts", *["micro-batch"] * 3] * 4
        for i, event in enumerate(events):
            if event["what"] == "counts":
                assert event["calls"] == {"allreduce_": [16]}
            elif i % 4 == 3:
                # DDP: its buckets, once (in the first step also the order of the buckets)
                assert set(event["calls"]) <= {"allreduce_", "broadcast_"}
                assert len(event["calls"]["allreduce_"]) <= 2
            else:
                assert event["calls"] == {}, i
        logs = [event for event in rank["counted"] if event["what"] == "log"]
        packed = 8 * packed_numel(2 * 3, 2)  # two steps of three micro-batches
        assert [log["calls"] for log in logs[:2]] == [{"allreduce_": [packed]}] * 2
        assert all(log["calls"] == {} for log in logs[2:])  # the summary of the run


def test_a_nan_on_one_rank_ends_all_with_rank_and_step(ranks):
    for rank in ranks:
        error, step, left = rank["at the log"].split(" | ")
        assert "NaN or infinite on rank 1 at step 3 (" in error and "rank 0" not in error
        assert step == "4" and left == "[]"


def test_no_checkpoint_holds_what_a_nan_made(ranks):
    for rank in ranks:
        error, step, left = rank["before a checkpoint"].split(" | ")
        assert "on rank 1 at step 3 (" in error and step == "4" and left == "[]"


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
