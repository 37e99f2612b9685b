"""From the words of a command line, and the file they may name, to three dataclasses."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

from transformers import HfArgumentParser

from dpo_fast.cli.arguments import DataArguments, ModelArguments
from dpo_fast.cli.config_file import FileOptions, read_config
from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.fields import OptionTable
from dpo_fast.config import REMOVED_FIELDS, DPOConfig

_CLASSES: tuple[Any, ...] = (DPOConfig, ModelArguments, DataArguments)


class Arguments(NamedTuple):
    """All that a command was told."""

    model: ModelArguments
    data: DataArguments
    training: DPOConfig


class _Parser(HfArgumentParser):
    """Its errors are messages, not two pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(command: str, description: str, words: Sequence[str], **forced: Any) -> Arguments:
    """Read flags and config file; flags win.

    Args:
        command: as the user wrote it, for the help.
        words: without the command.
        forced: fields that the command sets itself, whatever was given.

    Raises:
        UsageError: an unknown, removed or ill-typed option, a combination that DPOConfig refuses,
            or a missing model or data set.
        SystemExit: after ``--help``.
    """
    table = OptionTable(_CLASSES, REMOVED_FIELDS)
    parser = _parser(command, description)
    words, config = _take_config(list(words))
    from_file = FileOptions({}, {}) if config is None else read_config(config, table)
    words, values = _spell_out(words, table)
    parser.set_defaults(**from_file.defaults)
    _check_file_words(parser, from_file.words, config)
    joined = [word for option in from_file.words.values() for word in option]
    namespace, rest = parser.parse_known_args([*joined, *words])
    if rest:
        raise UsageError(f"unexpected {rest[0]!r}: every value follows its --option.")
    return _build({**vars(namespace), **values, **forced})


def _parser(command: str, description: str) -> _Parser:
    parser = _Parser(_CLASSES, prog=command, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these options; flags win over it"
    )
    return parser


def _take_config(words: list[str]) -> tuple[list[str], str | None]:
    """The words without ``--config FILE``, and the file."""
    rest: list[str] = []
    config: str | None = None
    i = 0
    while i < len(words):
        name, equals, value = words[i].partition("=")
        if name != "--config":
            rest.append(words[i])
        else:
            if config is not None:
                raise UsageError("--config is given twice: one file is read.")
            if not equals:
                i += 1
                value = words[i] if i < len(words) else ""
            if not value or value.startswith("--"):
                raise UsageError("--config needs the path of a YAML file.")
            config = value
        i += 1
    return rest, config


def _spell_out(words: list[str], table: OptionTable) -> tuple[list[str], dict[str, Any]]:
    """Check every flag's name; write out bare ``--bf16``; take out ``--max_length none`` and JSON
    for fields that are only a dict.

    Returns:
        The words for the parser, and the values that it cannot read.
    """
    out: list[str] = []
    values: dict[str, Any] = {}
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--") or word == "--help":
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        option = table.find(name, f"--{name}", negations=True)
        values.pop(option.name, None)  # the last one counts
        bare = not equals and (i == len(words) or words[i].startswith("--"))
        if bare:
            takes_true = option.is_switch or option.name == "resume_from_checkpoint"
            out.append(f"{word}=true" if takes_true and option.optional else word)
            continue
        text = value if equals else words[i]
        if option.says_none(text):
            values[option.name] = None
        elif option.takes(dict) and not option.takes(str):
            values[option.name] = _json(text, word)
        else:
            out.append(word)
            continue
        i += not equals
    return out, values


def _json(text: str, flag: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{flag} takes JSON, got {text!r} ({error}).") from None


def _check_file_words(parser: _Parser, words: dict[str, list[str]], path: str | None) -> None:
    for option in words.values():
        try:
            parser.parse_known_args(option)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


def _build(values: dict[str, Any]) -> Arguments:
    for name, what in (("model_name_or_path", "model"), ("dataset_name", "data set")):
        if values[name] is None:
            raise UsageError(f"no {what}: give --{name}, or {name}: in the --config file.")
    if values["output_dir"] is None:
        short = str(values["model_name_or_path"]).rstrip("/").rsplit("/", 1)[-1]
        values["output_dir"] = f"{short}-DPO"
    model, data = (
        cls(**{f.name: values[f.name] for f in fields(cls)})
        for cls in (ModelArguments, DataArguments)
    )
    chosen = {f.name: values[f.name] for f in fields(DPOConfig) if f.init}
    try:
        with warnings.catch_warnings():
            # TRL's name and default, which transformers 5.23 calls activation_checkpointing
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
            training = DPOConfig(**chosen)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    return Arguments(model, data, training)  # type: ignore[arg-type]
