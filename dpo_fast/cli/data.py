"""Where the pairs of a command come from."""

from typing import Any

from dpo_fast.cli.arguments import DataArguments
from dpo_fast.cli.errors import UsageError


def load_data(data: DataArguments, *, evaluated: bool) -> tuple[Any, Any]:
    """The pairs to train on, and those to evaluate on (None unless ``evaluated``)."""
    train = _load(data, str(data.dataset_name), data.dataset_train_split, "--dataset_train_split")
    if not evaluated:
        return train, None
    source = data.eval_dataset_name or str(data.dataset_name)
    split = data.dataset_test_split or ("train" if data.eval_dataset_name else "test")
    return train, _load(data, source, split, "--dataset_test_split")


def _load(data: DataArguments, source: str, split: str, flag: str) -> Any:
    from datasets.exceptions import DatasetsError

    from dpo_fast.data.load import load_preferences

    config = data.dataset_config if source == data.dataset_name else None
    try:
        return load_preferences(source, split=split, config_name=config, streaming=data.streaming)
    except (ValueError, OSError, DatasetsError) as error:
        hint = ""
        if flag == "--dataset_test_split" and data.eval_dataset_name is None:
            hint = (
                " Evaluation (eval_strategy) needs held-out pairs: name a file with "
                "--eval_dataset_name, or cut them off with --dataset_train_split 'train[:95%]' "
                "--dataset_test_split 'train[95%:]'."
            )
        raise UsageError(f"{source!r}, split {split!r}: {error}{hint}") from error
