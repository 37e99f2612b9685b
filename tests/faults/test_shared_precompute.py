"""Ranks and jobs that share one cache, as real gloo processes: nothing twice, nothing lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import assert_nothing_partial, cached_rows
from tests.faults.shared_jobs import BATCH, PART, ROWS, fill
from tests.nursery import Child, ends, launch, run

Facts = dict[str, Any]


def facts_of(out: Path, size: int) -> list[Facts]:
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(size)]


def filled(folder: Path, size: int, cache: Path, **options: Any) -> list[Facts]:
    """Run ``size`` ranks to their end."""
    children = launch(folder, size, fill, str(folder / "out"), str(cache), options)
    assert ends(children) == [0] * size, [child.text() for child in children]
    return facts_of(folder / "out", size)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """One process that computes all."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, fill, str(folder / "out"), str(folder / "cache"), {})
    return facts_of(folder / "out", 1)[0]


def test_ranks_share_by_tokens_and_get_the_same_bits(tmp_path: Path, alone: Facts) -> None:
    three = filled(tmp_path, 3, tmp_path / "cache")
    assert all(one["values"] == alone["values"] for one in three)
    assert sum(one["computed"] for one in three) == ROWS == len(cached_rows(tmp_path / "cache"))
    tokens = [one["tokens"] for one in three]
    assert sum(tokens) == alone["tokens"]
    assert max(tokens) - min(tokens) <= BATCH * 2 * 14  # one batch of rows of 14 tokens


def test_killed_ranks_go_on_with_another_world_size(tmp_path: Path, alone: Facts) -> None:
    cache = tmp_path / "cache"
    killed = launch(
        tmp_path / "a", 3, fill, str(tmp_path / "a/out"), str(cache), {"dies": {0: 3, 1: 2, 2: 1}}
    )
    assert ends(killed) == [-9, -9, -9]
    assert_nothing_partial(tmp_path)
    stored = len(cached_rows(cache))
    assert stored == 2 * PART  # two batches of rank 0 and of rank 1; the others were no part yet
    two = filled(tmp_path / "b", 2, cache)
    assert all(one["values"] == alone["values"] for one in two)
    assert sum(one["computed"] for one in two) == ROWS - stored
    # what was left is shared anew, whoever had it before
    tokens = [one["tokens"] for one in two]
    assert max(tokens) - min(tokens) <= BATCH * 2 * 14
    five = filled(tmp_path / "c", 5, cache)
    assert all(one["values"] == alone["values"] and one["computed"] == 0 for one in five)


def test_two_jobs_at_once_store_each_row_once(tmp_path: Path) -> None:
    """Other batches give other last bits; all readers must get the same ones all the same."""
    cache, meeting = tmp_path / "cache", tmp_path / "meeting"
    meeting.mkdir()
    jobs = []
    for number, batch in enumerate((4, 7, 3)):
        options = {"batch": batch, "meet": [str(meeting), 3]}
        out = str(tmp_path / f"job{number}")
        jobs.append(Child(tmp_path / f"log{number}", fill, out, str(cache), options))
    assert ends(jobs) == [0, 0, 0], [job.text() for job in jobs]
    assert len(cached_rows(cache)) == ROWS  # which also refuses a row that stands there twice
    run(tmp_path, fill, str(tmp_path / "later"), str(cache), {})
    later = facts_of(tmp_path / "later", 1)[0]
    assert later["computed"] == 0
    for number in range(3):
        assert facts_of(tmp_path / f"job{number}", 1)[0]["values"] == later["values"]


def test_machines_without_a_shared_disk_send_each_other_what_is_missing(
    tmp_path: Path, alone: Facts
) -> None:
    two = filled(tmp_path, 2, tmp_path / "disk", own_disk=True)
    assert all(one["values"] == alone["values"] for one in two)
    assert sum(one["computed"] for one in two) == ROWS
    whole = cached_rows(tmp_path / "disk0")  # LOCAL_RANK 0 is the one that stores for its machine
    assert len(whole) == ROWS


def test_ranks_with_different_rows_are_refused(tmp_path: Path) -> None:
    children = launch(
        tmp_path, 2, fill, str(tmp_path / "out"), str(tmp_path / "cache"), {"other_data": 1}
    )
    assert ends(children) == [1, 1]
    for child in children:
        assert "the rows of 'train' differ between rank" in child.text()


@pytest.mark.parametrize(
    ("options", "codes", "message"),
    [
        ({"dies": {1: 1}}, [1, -9], "rank 1 of 2 died without a word"),
        ({"fails": 1}, [1, 1], r"rank 1 of 2: ValueError: The reference's log-prob of row"),
    ],
)
def test_the_others_end_with_the_reason(
    tmp_path: Path, options: dict[str, Any], codes: list[int], message: str
) -> None:
    children = launch(tmp_path, 2, fill, str(tmp_path / "o"), str(tmp_path / "cache"), options)
    assert ends(children) == codes, [child.text() for child in children]
    text = children[0].text()
    assert "RankError" in text and message in text
