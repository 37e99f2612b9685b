"""Every option by name, whichever dataclass it is a field of; and the names that are gone."""

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from dpo_fast.cli.errors import UsageError, nearest

# Keys of TRL's config files and scripts that are not options here -> what to do instead.
_NOT_OPTIONS = {
    "datasets": "dataset_name with one file or folder (concatenate the parts beforehand)",
    "test_split_size": "dataset_train_split='train[:95%]' and dataset_test_split='train[95%:]'",
    "env": "the environment of the shell or of the launcher",
    "ref_model": "ref_model_name_or_path",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "target_modules": "lora_target_modules",
}


@dataclass(frozen=True)
class Option:
    """One field of one of the dataclasses; ``kinds``: its type without None, taken apart."""

    name: str
    kinds: tuple[Any, ...]
    optional: bool
    default: Any

    def takes(self, *kinds: type) -> bool:
        """Whether a value of one of these types may be given."""
        found = [typing.get_origin(kind) or kind for kind in self.kinds]
        return any(isinstance(one, type) and issubclass(one, kinds) for one in found)

    @property
    def is_list(self) -> bool:
        """Several words on the command line."""
        return len(self.kinds) == 1 and self.takes(list)

    @property
    def is_switch(self) -> bool:
        """True or false, and the name alone means true."""
        return self.kinds == (bool,)

    def says_none(self, text: str) -> bool:
        """Whether ``text`` means None; for text options it may be a value like any other."""
        could_be = not self.takes(str) or self.takes(int, float)
        return self.optional and could_be and text.lower() in ("none", "null")

    @property
    def is_choice(self) -> bool:
        """One of the values of an Enum."""
        return self.takes(Enum)


class OptionTable:
    """All options of the given dataclasses, under their names and aliases."""

    def __init__(self, dataclasses: Sequence[type], removed: dict[str, str]) -> None:
        self.removed = {**_NOT_OPTIONS, **removed}
        self.by_name: dict[str, Option] = {}
        for cls in dataclasses:
            hints = typing.get_type_hints(cls)
            for f in fields(cls):
                if not f.init:
                    continue
                kinds = _parts(hints[f.name])
                given = tuple(kind for kind in kinds if kind is not type(None))
                option = Option(f.name, given, len(given) < len(kinds), f.default)
                for alias in (f.name, *_aliases(f.metadata)):
                    self.by_name[alias.removeprefix("--")] = option
        switches = [o for o in self.by_name.values() if o.is_switch and o.default is True]
        self.negations = {f"no_{option.name}": option for option in switches}

    def find(self, name: str, shown: str, *, negations: bool = False) -> Option:
        """The option called ``name`` (hyphens are underscores).

        Args:
            shown: how the message writes it.
            negations: accept ``no_<switch>``.

        Raises:
            UsageError: it was removed, or there is none; names the replacement or the nearest.
        """
        key = name.replace("-", "_")
        if key in self.by_name:
            return self.by_name[key]
        if negations and key in self.negations:
            return self.negations[key]
        if key in self.removed:
            raise UsageError(f"{shown} is not an option (any more): use {self.removed[key]}.")
        prefix = "--" if shown.startswith("--") else ""
        raise UsageError(f"there is no option {shown}{nearest(key, self.by_name, prefix)}")


def _parts(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _aliases(metadata: Any) -> list[str]:
    aliases = metadata.get("aliases", [])
    return [aliases] if isinstance(aliases, str) else list(aliases)
