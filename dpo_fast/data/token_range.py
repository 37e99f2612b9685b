"""Token ids that the model has no embedding for, found before the first forward."""

from typing import Any

from dpo_fast.data.rows import ID_COLUMNS


def check_token_range(dataset: Any, vocab_size: int, name: str) -> None:
    """Raise unless every token id of a tokenised ``datasets.Dataset`` is in ``[0, vocab_size)``.

    On a GPU such an id ends in a device-side assertion that names neither row nor token; the usual
    cause is a token that was added to the tokenizer and not to the model. One pass over Arrow
    columns, about 1 GB/s.

    Raises:
        ValueError: names the data set, the id, the size and the remedy.
    """
    import pyarrow.compute as pc

    columns = dataset.select_columns(list(ID_COLUMNS)).with_format("arrow")
    for table in columns.iter(batch_size=10_000):
        for column in ID_COLUMNS:
            extremes = pc.min_max(pc.list_flatten(table[column])).as_py()
            low, high = extremes["min"], extremes["max"]
            if low is not None and not (0 <= low and high < vocab_size):
                raise ValueError(
                    f"The {name} dataset's {column} hold token id {high if low >= 0 else low}, and "
                    f"the model has embeddings for 0 to {vocab_size - 1}: use the model's own "
                    "tokenizer, or call model.resize_token_embeddings(len(tokenizer)) after adding "
                    "tokens."
                )
