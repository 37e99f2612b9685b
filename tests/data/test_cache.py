"""The cache of the token columns, and the processes that share it."""

import contextlib
import json
import multiprocessing
import os
import time
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset

from dpo_fast.data import PrepareReport, prepare_dataset
from dpo_fast.data.ranks import main_process_first
from dpo_fast.data.tokenize import RowTokenizer
from tests.data.rows import tokens
from tests.tiny import tiny_preferences, tiny_tokenizer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows tokenised since the test began."""
    seen: list[int] = []
    call = RowTokenizer.__call__

    def counting(self: RowTokenizer, batch: Any, indices: Any) -> Any:
        seen.extend(indices)
        return call(self, batch, indices)

    monkeypatch.setattr(RowTokenizer, "__call__", counting)
    return seen


def test_cache_depends_on_rows_and_tokenizer_only(tmp_path, calls, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [*tiny_preferences(6), {"prompt": "the riv", "chosen": "er", "rejected": "er b"}]
    path.write_text("\n".join(map(json.dumps, rows)))

    def prepare(tokenizer: Any = None, **arguments: Any) -> tuple[Any, PrepareReport]:
        dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
        return prepare_dataset(dataset, tokenizer or tiny_tokenizer(), **arguments)

    first, first_report = prepare(max_length=None)
    assert calls == list(range(7))
    calls.clear()
    caplog.clear()
    again, report = prepare(max_length=None)
    assert again._fingerprint == first._fingerprint
    assert again.to_list() == first.to_list() and again.column_names == first.column_names
    # What was seen while tokenising is still known.
    assert report == first_report and report.prompt_not_prefix == 1
    assert any("' riv'" in message for message in caplog.messages)
    used = tiny_tokenizer()
    used("some text", padding="max_length", max_length=9, truncation=True)
    used.padding_side, used.model_max_length = "left", 12
    prepare(used)
    prepare(num_proc=2)
    prepare(name="other")
    shorter, report = prepare(max_length=20)
    assert calls == [] and report.dropped and shorter._fingerprint != first._fingerprint
    prepare(max_length=20, truncation_mode="keep_end")
    assert calls == []
    other = tiny_tokenizer()
    other.chat_template += " "
    prepare(other)
    assert len(calls) == 7


def test_processes_give_the_same_rows():
    dataset = Dataset.from_list(tiny_preferences(30))
    tokenizer = tiny_tokenizer()
    alone, _ = prepare_dataset(dataset, tokenizer)
    shared, _ = prepare_dataset(dataset, tokenizer, num_proc=2)
    assert shared.to_list() == alone.to_list()
    assert shared._fingerprint == alone._fingerprint


def _take_turns(rank: int, folder: str, failing: int) -> None:
    """One process of a launch on two nodes of two: writes down when its turn was."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4
    )
    os.environ["LOCAL_RANK"] = str(rank % 2)
    with contextlib.suppress(ZeroDivisionError), main_process_first():
        begun = time.monotonic()
        time.sleep(0.1)
        with open(f"{folder}/{rank}", "w") as file:
            file.write(f"{begun} {time.monotonic()}")
        1 / (rank - failing)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("failing", [-1, 0, 2])
def test_the_main_processes_go_first(tmp_path, failing):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_take_turns, args=(rank, str(tmp_path), failing))
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    times = [tuple(map(float, (tmp_path / str(rank)).read_text().split())) for rank in range(4)]
    begun, ended = zip(*times, strict=True)
    assert ended[0] <= begun[2] and ended[2] <= min(begun[1], begun[3])


def test_tokenising_waits_its_turn(monkeypatch, calls):
    turns: list[int] = []

    @contextlib.contextmanager
    def turn() -> Any:
        turns.append(len(calls))
        yield
        turns.append(len(calls))

    monkeypatch.setattr("dpo_fast.data.prepare.main_process_first", turn)
    prepare_dataset(Dataset.from_list(tiny_preferences(5)), tiny_tokenizer())
    assert turns == [0, 5]


def test_only_rank_0_warns(monkeypatch, caplog):
    dataset = Dataset.from_list(tokens((9, 1, 1), (1, 1, 1)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, said in ((1, 0), (0, 1)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        caplog.clear()
        prepare_dataset(dataset, None, max_length=8)
        assert len(caplog.messages) == said
