"""Token columns of every accepted form, compared with those of TRL's own preparation."""

import json
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from dpo_fast.data import prepare_dataset
from tests.data.trl_side import trl_prepare
from tests.tiny import EOS, tiny_preferences, tiny_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}],
}
# The generation prompt opens a thought that a finished conversation does not have.
THINKING_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif -%}"
)


def chats(n: int = 12, **columns: Any) -> list[dict[str, Any]]:
    rows = tiny_preferences(n, conversational=True)
    return [row | {key: value(i) for key, value in columns.items()} for i, row in enumerate(rows)]


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompt moved into both answers, with a column after them."""
    return [
        {
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
            **{k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")},
            "source": f"s{i}",
        }
        for i, row in enumerate(rows)
    ]


def standard(n: int = 12) -> list[dict[str, Any]]:
    """Answers with and without EOS, empty, merging with the prompt, and an empty prompt."""
    rows = tiny_preferences(n)
    rows[1]["chosen"] += EOS
    rows[2]["rejected"] = ""
    rows[3] = {"prompt": "the riv", "chosen": "er carries", "rejected": "er paints"}
    rows[4]["prompt"] = ""
    rows[5]["chosen"] = EOS + " again"
    rows[6] = {"prompt": "the riv", "chosen": " carries", "rejected": "er paints"}
    rows[7] = {"prompt": "the riv", "chosen": "er carries", "rejected": " paints"}
    return rows


def with_tool_calls() -> list[dict[str, Any]]:
    """Messages that differ in their fields, which Arrow fills up with None."""
    rows = chats(tools=lambda i: json.dumps(TOOLS))
    rows[0]["chosen"] = [CALL, {"role": "tool", "content": "sunny"}, *rows[0]["chosen"]]
    return rows


FORMS = {
    "standard": standard(),
    "standard, implicit": implicit(tiny_preferences(12)),
    "conversational": chats(),
    "conversational, implicit": implicit(chats()),
    "turns": [
        row | {"prompt": [{"role": "system", "content": "Be brief."}, *row["prompt"]]}
        for row in chats()
    ],
    "tools": chats(tools=lambda i: TOOLS),
    "tools, implicit": implicit(chats(tools=lambda i: TOOLS)),
    "tools as JSON": chats(tools=lambda i: json.dumps(TOOLS) if i % 2 else None),
    "tools and calls": with_tool_calls(),
    "no tools": chats(tools=lambda i: []),
    "template arguments": chats(chat_template_kwargs=lambda i: {"persona": f"p{i}"}),
    "some template arguments": chats(
        chat_template_kwargs=lambda i: {"persona": "x"} if i % 2 else {"other": i}
    ),
    "arguments for the tokenizer": chats(
        chat_template_kwargs=lambda i: {"tokenizer_kwargs": {"split_special_tokens": bool(i % 2)}}
    ),
    "a template of the row's own": chats(
        chat_template_kwargs=lambda i: {"chat_template": THINKING_TEMPLATE, "persona": "x"}
    ),
    "tools and template arguments": chats(
        tools=lambda i: json.dumps(TOOLS), chat_template_kwargs=lambda i: {"persona": f"p{i}"}
    ),
}


def some_are_too_long(whole: Any) -> int:
    """A max_length that the prompts of three rows fill."""
    return sorted(len(row["prompt_ids"]) for row in whole)[-3]


@pytest.mark.parametrize("form", FORMS)
def test_columns_equal_trls(form):
    dataset = Dataset.from_list(FORMS[form])
    tokenizer = tiny_tokenizer()
    whole = trl_prepare(dataset, tokenizer, max_length=None)
    for max_length in (None, some_are_too_long(whole)):
        expected = trl_prepare(dataset, tokenizer, max_length=max_length)
        ours, report = prepare_dataset(dataset, tokenizer, max_length=max_length)
        assert ours.column_names == expected.column_names
        assert ours.to_list() == expected.to_list()
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours.features[column] == expected.features[column]
        assert report.rows_out == len(expected)
    assert 0 < len(expected) < len(dataset)


@pytest.mark.parametrize("form", FORMS)
def test_streams_equal_trls(form):
    rows = FORMS[form]

    def stream() -> IterableDataset:
        return IterableDataset.from_generator(lambda: iter([dict(row) for row in rows]))

    tokenizer = tiny_tokenizer()
    max_length = some_are_too_long(trl_prepare(stream(), tokenizer, max_length=None))
    expected = list(trl_prepare(stream(), tokenizer, max_length=max_length))
    ours, report = prepare_dataset(stream(), tokenizer, max_length=max_length)
    assert isinstance(ours, IterableDataset)
    assert (report.rows_in, report.rows_out) == (None, None)
    assert 0 < len(expected) < len(rows)
    # Rows of one stream may differ in their columns; reading them in batches fills up with None.
    optional = ("tools", "chat_template_kwargs")
    for mine, theirs in zip(ours, expected, strict=True):
        assert {k: v for k, v in mine.items() if k not in optional} == {
            k: v for k, v in theirs.items() if k not in optional
        }


@pytest.mark.parametrize("conversational", [False, True])
def test_a_prompt_that_is_not_a_prefix(conversational, caplog):
    """Its end is left out as in TRL, counted, and shown once with an example."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    rows = chats(6) if conversational else tiny_preferences(6)
    if not conversational:
        rows[2] = {"prompt": "the riv", "chosen": "er carries", "rejected": "er paints"}
    dataset = Dataset.from_list(rows)
    ours, report = prepare_dataset(dataset, tokenizer, max_length=None)
    assert ours.to_list() == trl_prepare(dataset, tokenizer, max_length=None).to_list()
    assert report.prompt_not_prefix == (6 if conversational else 1)
    assert report.prompt_example == ("<think>\n" if conversational else " riv")
    (message,) = [record.message for record in caplog.records if "beginning" in record.message]
    assert repr(report.prompt_example) in message
    assert f"{report.prompt_not_prefix} of 6 rows" in message
    whole = tokenizer.decode(ours[2]["prompt_ids"] + ours[2]["chosen_ids"])
    if conversational:
        assert "assistant\n" + rows[2]["chosen"][0]["content"] in whole
        assert "<think>" not in whole
    else:
        assert whole == "the river carries<|im_end|>"


def test_a_tokenizer_that_adds_bos_gets_it_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    for rows in (standard(), chats()):
        dataset = Dataset.from_list(rows)
        ours, _ = prepare_dataset(dataset, tokenizer)
        assert ours.to_list() == trl_prepare(dataset, tokenizer).to_list()
        assert all(row["prompt_ids"][0] == 1 and 1 not in row["chosen_ids"] for row in ours)


class ShoutingTokenizer(type(tiny_tokenizer())):  # type: ignore[misc]
    """A subclass that changes what a call does, as some model families' tokenizers do."""

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        text = [one.upper() for one in text] if isinstance(text, list) else text.upper()
        return super()._encode_plus(text, *args, **kwargs)


class OwnTemplateTokenizer(type(tiny_tokenizer())):  # type: ignore[misc]
    """A tokenizer whose chats are not rendered to text first, as mistral-common's."""

    def apply_chat_template(self, conversation: Any, tokenize: bool = True, **kwargs: Any) -> Any:
        if not tokenize:
            raise ValueError("this template has no text")
        ids = [n for turn in conversation for n in (1, *map(ord, turn["content"][:5]), 2)]
        return {"input_ids": [*ids, 1] if kwargs.get("add_generation_prompt") else ids}


@pytest.mark.parametrize("kind", [ShoutingTokenizer, OwnTemplateTokenizer])
@pytest.mark.parametrize("rows", [standard(), chats()], ids=["standard", "conversational"])
def test_tokenizers_with_methods_of_their_own(kind, rows):
    plain = tiny_tokenizer()
    tokenizer = kind(tokenizer_object=plain.backend_tokenizer, pad_token="<|endoftext|>")
    tokenizer.eos_token, tokenizer.chat_template = EOS, plain.chat_template
    dataset = Dataset.from_list(rows)
    ours, _ = prepare_dataset(dataset, tokenizer)
    assert ours.to_list() == trl_prepare(dataset, tokenizer).to_list()


@pytest.mark.parametrize("conversational", [False, True])
def test_text_for_a_processor(conversational):
    from transformers import CLIPImageProcessor, LlavaProcessor

    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(),
        tokenizer=tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<|endoftext|>",
        chat_template=(
            "{%- for message in messages %}{{ message['role'] }}:"
            "{%- for block in message['content'] %} {{ block['text'] }}{% endfor %}<|im_end|>"
            "{% endfor -%}{%- if add_generation_prompt %}assistant:{% endif -%}"
        ),
    )
    dataset = Dataset.from_list(tiny_preferences(8, conversational=conversational))
    ours, _ = prepare_dataset(dataset, processor)
    assert ours.to_list() == trl_prepare(dataset, processor).to_list()


@pytest.mark.parametrize("rows", [standard(), chats()], ids=["standard", "conversational"])
def test_what_a_tokenizer_was_used_for_before_does_not_matter(rows):
    used = tiny_tokenizer()
    used(["a b", "c"], padding="max_length", truncation=True, max_length=3)
    assert used.backend_tokenizer.padding and used.backend_tokenizer.truncation
    dataset = Dataset.from_list(rows)
    ours, _ = prepare_dataset(dataset, used)
    assert ours.to_list() == trl_prepare(dataset, tiny_tokenizer()).to_list()
