"""Preference data from a file, a folder or the hub, through datasets.load_dataset."""

from pathlib import Path
from typing import Any

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
        split: the split to return; None: all of them, as a dict. A single file and a saved
            ``Dataset`` are one split, which every name but another split's own gives.
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
        loaded = load_dataset(builder, data_files=str(path), streaming=streaming, **arguments)
        return loaded if split is None else loaded["train"]
    if path.is_dir() and _is_saved(path):
        loaded = _load_saved(path, streaming)
    elif path.is_dir():
        loaded = load_dataset(str(path), config_name, streaming=streaming)
    elif _looks_like_path(str(source), path):
        raise FileNotFoundError(f"there is no file or folder {str(source)!r}")
    else:
        loaded = load_dataset(str(source), config_name, streaming=streaming)
    return loaded if split is None else _pick(loaded, split, source)


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


def _load_saved(folder: Path, streaming: bool) -> Any:
    from datasets import DatasetDict, IterableDatasetDict, load_from_disk

    loaded = load_from_disk(str(folder))
    if not isinstance(loaded, DatasetDict):
        loaded = DatasetDict({str(loaded.split or "train"): loaded})
    if not streaming:
        return loaded
    return IterableDatasetDict({name: part.to_iterable_dataset() for name, part in loaded.items()})


def _looks_like_path(source: str, path: Path) -> bool:
    """Hub names are ``name`` or ``owner/name``, without a data file's suffix."""
    return (
        source.startswith((".", "/", "~", "\\"))
        or source.count("/") > 1
        or path.suffix.lower() in (*_BUILDERS, *_COMPRESSIONS)
    )


def _pick(loaded: Any, split: str, source: str | Path) -> Any:
    if split not in loaded:
        raise ValueError(f"{str(source)!r} has no split {split!r}; it has {sorted(loaded)}")
    return loaded[split]
