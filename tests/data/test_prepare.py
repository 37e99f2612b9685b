"""Preparation of whole datasets: given token columns, and what is refused."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dpo_fast.data import prepare_dataset
from tests.data.rows import IDS, tokens
from tests.tiny import tiny_preferences, tiny_tokenizer


def test_tokenised_rows_are_taken_as_they_are():
    rows = [row | {"ref_chosen_logps": -1.0, "note": "x"} for row in tokens((3, 2, 1), (4, 1, 5))]
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        assert list(prepare_dataset(dataset, None)[0]) == rows


def test_preparing_twice_changes_nothing():
    tokenizer = tiny_tokenizer()
    for conversational in (False, True):
        dataset = Dataset.from_list(tiny_preferences(9, conversational=conversational))
        once, _ = prepare_dataset(dataset, tokenizer)
        twice, _ = prepare_dataset(once, tokenizer)
        assert twice.to_list() == once.to_list()
        assert twice._fingerprint == once._fingerprint


def test_token_ids_that_disagree_with_the_text_are_refused():
    tokenizer = tiny_tokenizer()
    prepared, _ = prepare_dataset(Dataset.from_list(tiny_preferences(9)), tokenizer)
    stale = prepared.map(lambda row: {"prompt": row["prompt"] + " really?"})
    for dataset in (stale, stale.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"row 0: prompt_ids.*Drop the columns"):
            prepare_dataset(dataset, tokenizer)
    ids_only, _ = prepare_dataset(stale.remove_columns(["chosen", "rejected"]), tokenizer)
    assert ids_only["prompt_ids"][:] == prepared["prompt_ids"][:]
    again, _ = prepare_dataset(stale.remove_columns(list(IDS)), tokenizer)
    assert again["prompt_ids"][:] != prepared["prompt_ids"][:]


@pytest.mark.parametrize(
    ("column", "error", "said"),
    [
        (["a b"], TypeError, "'chosen_ids' holds string"),
        ([[0.5]], TypeError, "'chosen_ids' holds list<.*double>"),
        ([[["a"]]], TypeError, "'chosen_ids'"),
    ],
)
def test_token_columns_of_another_type(column, error, said):
    dataset = Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": column, "rejected_ids": [[2]]})
    with pytest.raises(error, match=said):
        prepare_dataset(dataset, None)


def test_a_null_row_of_token_ids():
    dataset = Dataset.from_dict(
        {"prompt_ids": [[1], [1]], "chosen_ids": [[2], None], "rejected_ids": [[2], [3]]}
    )
    with pytest.raises(ValueError, match="'chosen_ids' is null in 1 rows"):
        prepare_dataset(dataset, None)


@pytest.mark.parametrize(
    ("dataset", "error", "said"),
    [
        (None, ValueError, "train dataset is None"),
        ([{"prompt": "a"}], TypeError, "list.*from_list"),
        (DatasetDict(train=Dataset.from_list(tokens((1, 1, 1)))), TypeError, r"\['train'\]"),
        (Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), ValueError, "no rows"),
        (IterableDataset.from_generator(lambda: iter([])), ValueError, "yields no rows"),
        (Dataset.from_dict({"prompt": ["a"]}), ValueError, r"\['prompt'\]"),
        (IterableDataset.from_generator(lambda: iter([{"text": "a"}])), ValueError, r"\['text'\]"),
        (
            Dataset.from_dict({"image": [1], "chosen": ["a"], "rejected": ["b"]}),
            ValueError,
            "vision",
        ),
    ],
)
def test_datasets_that_cannot_be_prepared(dataset, error, said):
    with pytest.raises(error, match=said):
        prepare_dataset(dataset, tiny_tokenizer())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": -1}, "max_length=-1"),
        ({"truncation_mode": "both"}, "'both'"),
        ({"num_proc": 0}, "num_proc=0"),
    ],
)
def test_arguments_out_of_range(arguments, said):
    with pytest.raises(ValueError, match=said):
        prepare_dataset(Dataset.from_list(tokens((1, 1, 1))), None, **arguments)


def test_a_bad_row_is_named():
    rows = tiny_preferences(300)
    rows[271]["rejected"] = None
    with pytest.raises(TypeError, match="row 271: rejected is NoneType"):
        prepare_dataset(Dataset.from_list(rows), tiny_tokenizer())
    chats = tiny_preferences(5, conversational=True)
    chats[3]["prompt"] = []
    with pytest.raises(ValueError, match="row 3: the prompt has no message"):
        prepare_dataset(Dataset.from_list(chats), tiny_tokenizer())
    unshared = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in tiny_preferences(5, conversational=True)
    ]
    unshared[2]["rejected"] = unshared[2]["rejected"][1:]
    with pytest.raises(ValueError, match="row 2: the prompt has no message"):
        prepare_dataset(Dataset.from_list(unshared), tiny_tokenizer())


def test_a_tokenizer_without_what_the_rows_need():
    dataset = Dataset.from_list(tiny_preferences(2))
    with pytest.raises(ValueError, match="processing_class"):
        prepare_dataset(dataset, None)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"eos_token.*set tokenizer\.eos_token"):
        prepare_dataset(dataset, tokenizer)
    chats = Dataset.from_list(tiny_preferences(2, conversational=True))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template"):
        prepare_dataset(chats, tokenizer)


def test_datasets_with_a_format():
    rows = tiny_preferences(4)
    expected = prepare_dataset(Dataset.from_list(rows), tiny_tokenizer())[0].to_list()
    for formatted in (
        Dataset.from_list(rows).with_format("numpy"),
        Dataset.from_list(rows).with_format("torch"),
        Dataset.from_list(rows).with_format(None, columns=["prompt"]),
    ):
        assert list(prepare_dataset(formatted, tiny_tokenizer())[0]) == expected
    transformed = Dataset.from_list(rows).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="set_transform"):
        prepare_dataset(transformed, tiny_tokenizer())


@pytest.mark.parametrize("max_length", [1024, None])
def test_an_image_in_a_later_row(max_length):
    """Text in the first row and a block of an image in the sixth: found while tokenising."""

    def chat(content):
        answers = {k: [{"role": "assistant", "content": text(k)}] for k in ("chosen", "rejected")}
        return {"prompt": [{"role": "user", "content": content}], **answers}

    def text(words):
        return [{"type": "text", "text": words, "image_url": None}]

    picture = [{"type": "image_url", "text": None, "image_url": "a.png"}]
    rows = [chat(text("hello")) for _ in range(5)] + [chat(text("look") + picture)]
    rows += [chat(text("bye")) for _ in range(40)]
    dataset = Dataset.from_list(rows)
    for given in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match="row 5: prompt holds a block of type 'image_url'"):
            list(prepare_dataset(given, tiny_tokenizer(), max_length=max_length)[0])
    videos = dataset.select(range(3)).add_column("videos", [[]] * 3)
    with pytest.raises(ValueError, match=r"'videos'.*remove_columns\(\['videos'\]\)"):
        prepare_dataset(videos, tiny_tokenizer(), max_length=max_length)
