"""``--config file.yaml``: the same options as the flags, under the same names.

Values become words of a command line wherever they can, so that a file and a flag are checked by
the same rules; the others (null, mappings) become defaults.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.fields import Option, OptionTable


class FileOptions(NamedTuple):
    """``words``: for each option, its words; ``defaults``: values that no word can say."""

    words: dict[str, list[str]]
    defaults: dict[str, Any]


def read_config(path: str | Path, table: OptionTable) -> FileOptions:
    """Options of a YAML (or JSON) file.

    Raises:
        UsageError: no such file, not YAML, not a mapping, an unknown or removed name, a value of a
            kind that the option does not take.
    """
    words: dict[str, list[str]] = {}
    defaults: dict[str, Any] = {}
    for key, value in _load(Path(path)).items():
        try:
            option = table.find(str(key), repr(str(key)))
            if option.name in words or option.name in defaults:
                raise UsageError(f"{key!r} is given twice, under two names: keep one.")
            if _has_no_words(option, key, value):
                defaults[option.name] = value
            else:
                words[option.name] = _words(option, value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return FileOptions(words, defaults)


def _load(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"--config: there is no file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} cannot be read: {error}") from None
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {path} is not valid YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(
            f"--config: {path} must hold `name: value` lines, and holds a {type(loaded).__name__}."
        )
    return loaded


def _has_no_words(option: Option, key: Any, value: Any) -> bool:
    """Whether a value can only be handed over as it is.

    Raises:
        UsageError: the option takes no such kind of value.
    """
    if value is None:
        if not option.optional:
            raise UsageError(f"{key!r} needs a value, not null: give one, or drop the line.")
        return True
    if isinstance(value, dict):
        if not option.takes(dict):
            raise UsageError(f"{key!r} takes no mapping, got {value!r}.")
        return True
    if isinstance(value, list):
        if not option.takes(list):
            raise UsageError(f"{key!r} takes one value, got the list {value!r}.")
        return not option.is_list or not value
    return False


def _words(option: Option, value: Any) -> list[str]:
    if option.is_list:
        values = value if isinstance(value, list) else [value]
        return [f"--{option.name}", *map(str, values)]
    if value is False and (option.is_choice or option.default == "no"):
        return [f"--{option.name}=no"]  # YAML 1.1 reads a bare `no` as false
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return [f"--{option.name}={text}"]
