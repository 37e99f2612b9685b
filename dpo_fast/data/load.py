"""Preference data from a file, a folder or the hub, through datasets.load_dataset."""

from pathlib import Path
from typing import Any

from dpo_fast.hub_names import looks_like_path

# Suffix of a data file -> the builder of datasets that reads it, and its arguments.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def load_preferences(
    source: str | Path,
    *,
    split: str | None = "train",
    config_name: str | None = None,
    streaming: bool = False,
) -> Any:
    """Load preference data.

    Args:
        source: a json, jsonl, csv, tsv, parquet or arrow file (compressed or not); a folder of such
            files; a folder that ``save_to_disk`` wrote; or the name of a data set on the hub.
        split: the split to return, or a slice of one (``"train[:90%]"``); None: all, as a dict. A
            file is one split, "train"; so is a saved ``Dataset``, which has its own name as well.
        config_name: configuration of a data set on the hub, or of a folder that declares some.
        streaming: return an ``IterableDataset`` instead of a ``Dataset``.

    Returns:
        ``Dataset`` or ``IterableDataset``, or their dict when ``split`` is None.

    Raises:
        FileNotFoundError: ``source`` looks like a path, and nothing is there.
        ValueError: the file's kind is not known, the folder has no data, or there is no such split.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    if path.is_file():
        builder, arguments = _builder(path)
        arguments = {**arguments, "data_files": str(path)}
        return load_dataset(builder, split=split, streaming=streaming, **arguments)
    if path.is_dir() and _is_saved(path):
        return _load_saved(path, split, streaming)
    if path.is_dir():
        source = str(path)
    elif _looks_like_path(str(source), path):
        raise FileNotFoundError(f"there is no file or folder {str(source)!r}")
    return load_dataset(str(source), config_name, split=split, streaming=streaming)


def _builder(path: Path) -> tuple[str, dict[str, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _BUILDERS:
        raise ValueError(
            f"{path} is not a kind of file that is known; use one of {sorted(_BUILDERS)}, "
            f"compressed ({', '.join(_COMPRESSIONS)}) or not"
        )
    return _BUILDERS[suffixes[-1]]


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder: a DatasetDict, or a Dataset."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(folder: Path, split: str | None, streaming: bool) -> Any:
    from datasets import DatasetDict, IterableDatasetDict, load_from_disk

    loaded = load_from_disk(str(folder))
    if not isinstance(loaded, DatasetDict):
        name = str(loaded.split or "train")
        loaded = DatasetDict({"train" if split == "train" else name: loaded})
    if split is not None and split not in loaded:
        raise ValueError(f"{str(folder)!r} has no split {split!r}; it has {sorted(loaded)}")
    if streaming:
        parts = {name: part.to_iterable_dataset() for name, part in loaded.items()}
        loaded = IterableDatasetDict(parts)
    return loaded if split is None else loaded[split]


def _looks_like_path(source: str, path: Path) -> bool:
    """Hub names are ``name`` or ``owner/name``, without a data file's suffix."""
    return looks_like_path(source) or path.suffix.lower() in (*_BUILDERS, *_COMPRESSIONS)
