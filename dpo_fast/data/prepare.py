"""Datasets of preference rows to datasets of token ids, ready for the collator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_fast.data.collate import check_truncation
from dpo_fast.data.drop import REASONS, Truncation, token_lengths
from dpo_fast.data.fingerprint import FORMAT_VERSION, tokenizer_fingerprint
from dpo_fast.data.ranks import main_process_first, warn
from dpo_fast.data.report import PrepareReport, prompt_warning
from dpo_fast.data.rows import ID_COLUMNS, RowFormat, detect_format
from dpo_fast.data.stream import prepare_stream
from dpo_fast.data.tokenize import PROMPT_END, RowTokenizer, inner_tokenizer

# Rows tokenised together: enough to amortise a call, few enough that long rows fit in memory.
_BATCH_ROWS = 256
# Rows of which text and given token ids are compared.
_SAMPLE_ROWS = 16


def prepare_dataset(
    dataset: Any,
    processing_class: Any,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
    tokenise: Callable[[Any], Any] | None = None,
) -> tuple[Any, PrepareReport]:
    """Tokenise a dataset of preference pairs and leave out those that nothing can be learned from.

    The columns are TRL's: the given ones (with the answers' EOS added and an implicit prompt split
    off), ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``. Truncation happens in the collator,
    so the token columns depend on the rows and the tokenizer only, and so does their cache (for a
    dataset that lies on disk). Rows that already have the three columns are not tokenised again;
    text next to them must agree with them.

    Args:
        dataset: ``datasets.Dataset`` or ``datasets.IterableDataset``; rows: ``dpo_fast.data.rows``.
        processing_class: tokenizer, or processor that holds one; None only for tokenised rows.
        max_length: tokens of prompt and answer together that the collator will keep; None: all.
        truncation_mode: ``"keep_start"`` or ``"keep_end"``.
        num_proc: processes that tokenise a ``Dataset``; None: this one.
        name: of the dataset, in messages and progress bars.
        tokenise: adds the three token columns to a dataset of text, in place of what happens here;
            not called for rows that have them.

    Returns:
        The dataset and a :class:`PrepareReport`. Pairs are dropped when truncation leaves an answer
        without a token to score: the report counts them by reason, and a warning says so. An
        ``IterableDataset`` stays lazy, and its report has no counts.

    Raises:
        ValueError: no dataset, no rows, missing columns, images, arguments out of range, a
            tokenizer without what the rows need, token ids that disagree with text, no row left.
        TypeError: another kind of dataset, or values of another type than the form of the rows.
    """
    _check_arguments(dataset, max_length, truncation_mode, num_proc, name)
    truncation = Truncation(max_length, truncation_mode)
    stream = _is_stream(dataset)
    if not stream and (dataset.format["type"], dataset.format["columns"]) != (
        None,
        dataset.column_names,
    ):
        dataset = dataset.with_format(None)
    given, sample = dataset, _sample(dataset, name)
    row_format = detect_format(sample[0][1].keys(), sample[0][1])
    _check_tokenizer(processing_class, row_format)
    if row_format.tokenised and row_format.has_text:
        _check_agreement(sample, processing_class, row_format)
    if tokenise is not None and not row_format.tokenised:
        dataset, row_format = tokenise(dataset), row_format._replace(tokenised=True)
    if stream:
        dataset = prepare_stream(dataset, processing_class, row_format, truncation, name)
        return dataset, PrepareReport(name, None, None)
    rows_in, count, example = len(given), 0, None
    if not row_format.tokenised:
        dataset, count, example = _tokenize(dataset, processing_class, row_format, num_proc, name)
        if example is not None:
            warn(prompt_warning(name, example, f"{count} of {len(dataset)} rows"))
    return _drop(dataset, truncation, name, rows_in, count, example)


def _is_stream(dataset: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def _check_arguments(
    dataset: Any, max_length: int | None, truncation_mode: str, num_proc: int | None, name: str
) -> None:
    from datasets import Dataset

    check_truncation(max_length, truncation_mode)
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc={num_proc} must be a positive number of processes, or None")
    if dataset is None:
        raise ValueError(f"the {name} dataset is None; pass a datasets.Dataset or IterableDataset")
    if _is_stream(dataset):
        return
    if not isinstance(dataset, Dataset):
        hint = "datasets.Dataset.from_list makes one from a list of dicts"
        if isinstance(dataset, dict):
            hint = f"pass one of its splits: {sorted(dataset)}"
        raise TypeError(
            f"the {name} dataset is a {type(dataset).__name__}, expected a datasets.Dataset or "
            f"IterableDataset; {hint}"
        )
    if len(dataset) == 0:
        raise ValueError(f"the {name} dataset has no rows; training needs at least one pair")
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"the {name} dataset has a transform (set_transform): rows made while reading cannot "
            "be tokenised beforehand; apply it with dataset.map, or make it an IterableDataset"
        )


def _check_tokenizer(processing_class: Any, row_format: RowFormat) -> None:
    if not row_format.has_text:
        return
    if processing_class is None:
        raise ValueError("text rows need a tokenizer: pass processing_class")
    if not row_format.conversational and inner_tokenizer(processing_class).eos_token is None:
        raise ValueError(
            "the tokenizer has no eos_token, which ends each answer of standard (non-chat) rows; "
            "set tokenizer.eos_token to the token that ends a text for this model"
        )


def _tokenize(
    dataset: Any, processing_class: Any, row_format: RowFormat, num_proc: int | None, name: str
) -> tuple[Any, int, str | None]:
    """The dataset with its token columns, how many prompts lost their end, and one such end."""
    from datasets import Features, List, Value
    from datasets.fingerprint import Hasher

    features = dict(dataset.features)
    if row_format.implicit_prompt:
        features["prompt"] = features["chosen"]
    features |= {column: List(Value("int64")) for column in ID_COLUMNS}
    features[PROMPT_END] = Value("string")
    key = (dataset._fingerprint, FORMAT_VERSION, tokenizer_fingerprint(processing_class))
    with main_process_first():
        tokenised = dataset.map(
            RowTokenizer(processing_class, row_format),
            with_indices=True,
            batched=True,
            batch_size=_BATCH_ROWS,
            features=Features(features),
            num_proc=num_proc,
            new_fingerprint=Hasher.hash(key),
            desc=f"Tokenizing {name} dataset",
        )
    ends = tokenised.data.column(PROMPT_END)
    count = len(ends) - ends.null_count
    example = ends.drop_null()[0].as_py() if count else None
    return tokenised.remove_columns(PROMPT_END), count, example


def _sample(dataset: Any, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Some rows with their positions, the first one first; of a stream, the first one only."""
    if not _is_stream(dataset):
        rows = np.linspace(0, len(dataset) - 1, min(_SAMPLE_ROWS, len(dataset))).astype(int)
        return [(row, dataset[row]) for row in rows.tolist()]
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"the {name} dataset yields no rows; training needs at least one pair")
    return [(0, first)]


def _check_agreement(
    sample: Sequence[tuple[int, Mapping[str, Any]]], processing_class: Any, row_format: RowFormat
) -> None:
    """Raise unless a sample's token columns are what its text columns tokenise to."""
    tokenize = RowTokenizer(processing_class, row_format)
    for index, row in sample:
        tokens = tokenize({column: [value] for column, value in row.items()}, [index])
        for column in ID_COLUMNS:
            if list(row[column]) != tokens[column][0]:
                raise ValueError(
                    f"row {index}: {column} is not what this tokenizer makes of the row's text. "
                    f"Drop the columns {list(ID_COLUMNS)} to tokenise the text, or drop chosen and "
                    "rejected to keep the token ids as they are"
                )


def _drop(
    dataset: Any,
    truncation: Truncation,
    name: str,
    rows_in: int,
    prompt_count: int,
    prompt_example: str | None,
) -> tuple[Any, PrepareReport]:
    if len(dataset) == 0:
        raise ValueError(
            f"{name}: its tokenisation left none of {rows_in} pairs with {truncation}: raise "
            "max_length, or look at the rows"
        )
    prompt, chosen, rejected = token_lengths(dataset)
    fault = truncation.fault(prompt, chosen, rejected)
    counts = {reason: int((fault == i).sum()) for i, reason in enumerate(REASONS)}
    counts["the tokenisation left them out"] = rows_in - len(dataset)
    kept = fault < 0
    cut = np.maximum(truncation.excess(prompt, chosen), truncation.excess(prompt, rejected)) > 0
    report = PrepareReport(
        name=name,
        rows_in=rows_in,
        rows_out=int(kept.sum()),
        dropped={reason: count for reason, count in counts.items() if count},
        truncated=int((cut & kept).sum()),
        prompt_not_prefix=prompt_count,
        prompt_example=prompt_example,
    )
    if not report.rows_out:
        raise ValueError(
            f"{report.describe()}: no pair is left to train on with {truncation}. The longest "
            f"prompt has {prompt.max()} tokens, the median one {int(np.median(prompt))}; raise "
            "max_length, or look at the rows whose answers are empty"
        )
    if report.dropped:
        warn(f"{report.describe()} ({truncation})")
    if not kept.all():
        dataset = dataset.select(np.flatnonzero(kept))
    return dataset, report
