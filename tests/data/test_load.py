"""Preference data from files and folders, through datasets."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dpo_fast.data import load_preferences, prepare_dataset
from tests.tiny import tiny_preferences, tiny_tokenizer

ROWS = tiny_preferences(6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, rows=ROWS):
    dataset = Dataset.from_list(rows)
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            dataset.to_csv(path, index=False)
        case ".tsv":
            dataset.to_csv(path, index=False, sep="\t")
        case ".parquet":
            dataset.to_parquet(path)
        case ".gz":
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "B.JSONL"]
)
def test_files(tmp_path, name):
    lower = tmp_path / name.lower()
    write(lower)
    path = lower.rename(tmp_path / name)
    assert load_preferences(path).to_list() == ROWS
    stream = load_preferences(str(path), streaming=True)
    assert isinstance(stream, IterableDataset) and list(stream) == ROWS


def test_slices_and_splits_of_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert load_preferences(path, split="train[:50%]").to_list() == ROWS[:3]
    assert list(load_preferences(path, split=None)) == ["train"]
    with pytest.raises(ValueError, match="test"):
        load_preferences(path, split="test")


def test_chats_with_tools_from_a_file_are_prepared_like_those_from_memory(tmp_path):
    rows = [
        row | {"tools": json.dumps([{"type": "function", "function": {"name": f"f{i}"}}])}
        for i, row in enumerate(tiny_preferences(6, conversational=True))
    ]
    loaded = load_preferences(write(tmp_path / "a.jsonl", rows))
    tokenizer = tiny_tokenizer()
    from_memory, _ = prepare_dataset(Dataset.from_list(rows), tokenizer)
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    prepared, _ = prepare_dataset(loaded, tokenizer)
    assert prepared.select_columns(ids).to_list() == from_memory.select_columns(ids).to_list()


def test_a_folder_of_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:4])
    write(folder / "test.jsonl", ROWS[4:])
    assert load_preferences(folder).to_list() == ROWS[:4]
    assert load_preferences(folder, split="test").to_list() == ROWS[4:]
    assert sorted(load_preferences(folder, split=None)) == ["test", "train"]


def test_what_save_to_disk_wrote(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS[:4]), valid=Dataset.from_list(ROWS[4:])).save_to_disk(
        tmp_path / "two"
    )
    assert load_preferences(tmp_path / "one").to_list() == ROWS
    assert load_preferences(tmp_path / "two", split="valid").to_list() == ROWS[4:]
    assert sorted(load_preferences(tmp_path / "two", split=None)) == ["train", "valid"]
    assert list(load_preferences(tmp_path / "one", streaming=True)) == ROWS
    with pytest.raises(ValueError, match=r"'test'.*\['train', 'valid'\]"):
        load_preferences(tmp_path / "two", split="test")
    with pytest.raises(ValueError, match=r"'test'.*\['train'\]"):
        load_preferences(tmp_path / "one", split="test")


def test_paths_that_lead_nowhere(tmp_path):
    for source in (tmp_path / "no.jsonl", "./nothing", "no.parquet", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            load_preferences(source)
    odd = tmp_path / "a.docx"
    odd.write_text("x")
    with pytest.raises(ValueError, match=r"docx.*\.jsonl"):
        load_preferences(odd)


def test_other_names_are_left_to_the_hub(monkeypatch):
    seen = {}

    def load_dataset(name, config_name=None, **arguments):
        seen.update(name=name, config_name=config_name, **arguments)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load_preferences("owner/pairs", config_name="en", split="test", streaming=True)
    assert seen == {
        "name": "owner/pairs",
        "config_name": "en",
        "split": "test",
        "streaming": True,
    }
