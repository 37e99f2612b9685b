"""Preference rows in the forms people have them, made canonical: prompt, chosen, rejected.

Accepted forms (those of TRL):

- standard: ``prompt``, ``chosen`` and ``rejected`` are strings;
- conversational: the three are lists of messages (dicts with ``role``), with optional columns
  ``tools`` (a list, or its JSON) and ``chat_template_kwargs`` (a dict, or its JSON);
- either of them without ``prompt``: it is what ``chosen`` and ``rejected`` begin with;
- tokenised: ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` are lists of token ids.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_MEDIA_COLUMNS = (
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
    "pixel_values",
    "pixel_values_videos",
)
_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
# Arguments of apply_chat_template that the library sets itself.
_OWN_TEMPLATE_ARGUMENTS = ("conversation", "add_generation_prompt", "tokenize", "return_dict")
_ACCEPTED = (
    "prompt + chosen + rejected, or chosen + rejected (the prompt is their common beginning), each "
    "of strings or of lists of messages; or prompt_ids + chosen_ids + rejected_ids"
)


class RowFormat(NamedTuple):
    """What the rows of a dataset look like.

    Attributes:
        tokenised: the rows hold ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
        has_text: the rows hold ``chosen`` and ``rejected``.
        conversational: the text is lists of messages.
        implicit_prompt: the text has no ``prompt`` column.
    """

    tokenised: bool
    has_text: bool
    conversational: bool
    implicit_prompt: bool


def detect_format(columns: Collection[str], row: Mapping[str, Any]) -> RowFormat:
    """The form of a dataset, from its columns and its first row.

    Raises:
        ValueError: a column is missing, or there are columns of images, videos or audio.
        TypeError: ``prompt``, ``chosen`` and ``rejected`` are not all strings or all message lists.
    """
    media = [name for name in _MEDIA_COLUMNS if name in columns]
    if media:
        raise ValueError(
            f"the dataset has the column {media[0]!r}: vision, video and audio preference data are "
            f"not supported. To train on its text alone, drop it: dataset.remove_columns({media!r})"
        )
    tokenised = all(name in columns for name in ID_COLUMNS)
    has_text = "chosen" in columns and "rejected" in columns
    if not tokenised and not has_text:
        raise ValueError(
            f"the dataset has the columns {sorted(columns)}, which are not preference pairs. "
            f"Accepted: {_ACCEPTED}.{_hint(columns)}"
        )
    conversational = implicit_prompt = False
    if has_text:
        conversational = isinstance(row["chosen"], list)
        implicit_prompt = "prompt" not in columns
        names = TEXT_COLUMNS[1:] if implicit_prompt else TEXT_COLUMNS
        check_row({name: row[name] for name in names}, conversational, 0)
    return RowFormat(tokenised, has_text, conversational, implicit_prompt)


def _hint(columns: Collection[str]) -> str:
    if "completion" in columns and "label" in columns:
        return (
            " Single answers with a label (KTO data) must be paired into chosen and rejected first."
        )
    if "messages" in columns or "text" in columns or "completion" in columns:
        return " One answer a row is data for supervised fine-tuning; DPO needs a rejected one too."
    return ""


def check_row(row: Mapping[str, Any], conversational: bool, index: int) -> None:
    """Raise unless every text of the row has the dataset's form.

    Raises:
        TypeError: a value is not a string (standard) or not a list of messages (conversational).
        ValueError: a conversational prompt is empty, or a message holds an image, a video or audio.
    """
    for name, value in row.items():
        if not conversational:
            if not isinstance(value, str):
                raise TypeError(_wrong_type(name, value, index, "a string"))
            continue
        if not isinstance(value, list) or not all(
            isinstance(message, Mapping) and "role" in message for message in value
        ):
            raise TypeError(_wrong_type(name, value, index, "a list of messages with a 'role'"))
        medium = next(filter(None, map(_medium, value)), None)
        if medium is not None:
            raise ValueError(
                f"row {index}: {name} holds {medium}: vision, video and audio preference data are "
                "not supported; keep the rows whose messages hold only text"
            )
    if conversational and row.get("prompt") == []:
        raise ValueError(
            f"row {index}: the prompt has no message (chosen and rejected share no first turn, or "
            "the prompt column is empty); filter such rows out, a chat needs a prompt"
        )


def _wrong_type(name: str, value: Any, index: int, expected: str) -> str:
    shown = repr(value)
    message = (
        f"row {index}: {name} is {type(value).__name__} {shown[:80]}{'...' * (len(shown) > 80)}, "
        f"expected {expected} like the first row's chosen."
    )
    if name == "prompt" and isinstance(value, str):
        message += (
            " If chosen and rejected are whole conversations, drop the prompt column: their common "
            "turns are the prompt. Otherwise make it [{'role': 'user', 'content': prompt}]"
        )
    return message


def _medium(message: Mapping[str, Any]) -> str | None:
    """What of a message is no text, or None: a block of that type (``image``, ``image_url``,
    ``input_audio`` ...), or a field of that name. Arrow adds the fields of other blocks, empty.
    """
    content = message.get("content")
    blocks = (
        [block for block in content if isinstance(block, Mapping)]
        if isinstance(content, list)
        else []
    )
    for part in (message, *blocks):
        kind = part.get("type")
        if isinstance(kind, str) and _names_medium(kind):
            return f"a block of type {kind!r}"
        for field, value in part.items():
            if value is not None and value != [] and _names_medium(field):
                return f"the field {field!r}"
    return None


def _names_medium(name: str) -> bool:
    return not _MEDIA.isdisjoint(name.split("_"))


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and remainders of two answers that begin with their prompt.

    The prompt is the longest common beginning, in characters or in turns, but always leaves each
    answer its last element; a space that ends it goes to the answers. Messages are compared without
    their empty (None) fields, which Arrow adds to rows whose messages differ in fields.
    """
    shorter = min(len(chosen), len(rejected))
    if isinstance(chosen, str):
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    else:
        same = [_filled(a) == _filled(b) for a, b in zip(chosen, rejected, strict=False)]
    cut = same.index(False) if False in same else max(shorter - 1, 0)
    if False in same and cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _filled(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if value is not None}


def with_eos(answers: Sequence[str], eos_token: str) -> list[str]:
    """The answers, each ending with the EOS token once."""
    return [answer if answer.endswith(eos_token) else answer + eos_token for answer in answers]


def template_arguments(tools: Any, chat_template_kwargs: Any, index: int) -> dict[str, Any]:
    """Arguments of ``apply_chat_template`` that a row brings along.

    Raises:
        ValueError: the JSON of a column is not valid, or an argument is the library's own.
        TypeError: ``chat_template_kwargs`` is not a dict.
    """
    tools = _from_json(tools, "tools", index)
    kwargs = _from_json(chat_template_kwargs, "chat_template_kwargs", index) or {}
    if not isinstance(kwargs, Mapping):
        raise TypeError(
            f"row {index}: chat_template_kwargs is {type(kwargs).__name__}, expected a dict of "
            "arguments for the chat template"
        )
    own = [name for name in _OWN_TEMPLATE_ARGUMENTS if name in kwargs]
    if own:
        raise ValueError(
            f"row {index}: chat_template_kwargs sets {own}, which the tokenisation sets itself; "
            "remove it from the column"
        )
    return {"tools": tools, **kwargs}


def _from_json(value: Any, name: str, index: int) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"row {index}: {name} is not valid JSON ({error}): {value[:80]!r}; write it with "
            "json.dumps, or store the value itself"
        ) from error
