"""The top level of `dpo-fast`: picks the command; loads nothing else, so help costs nothing."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from dpo_fast import __version__
from dpo_fast.cli.errors import reported


class Command(NamedTuple):
    """``module.run(arguments) -> exit code``, and a line for the help."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("dpo_fast.cli.train", "train a model on preference pairs"),
    "precompute": Command(
        "dpo_fast.cli.precompute", "fill the cache of reference log-probs, and nothing else"
    ),
    "plan": Command(
        "dpo_fast.cli.plan", "memory and time of every way to train a model, from its config alone"
    ),
    "inspect-data": Command(
        "dpo_fast.cli.inspect_data", "lengths, truncation, ties, duplicates of preference pairs"
    ),
    "demo": Command(
        "dpo_fast.cli.demo", "a small model, all four references, a table and a picture; offline"
    ),
    "bench": Command("dpo_fast.cli.bench", "dpo_fast against the naive path and its peers"),
    "doctor": Command(
        "dpo_fast.cli.doctor", "what runs here and why, what is missing, and a numerical self-check"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``dpo-fast``; None: those of this process.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        print(f"dpo-fast {__version__}")
        return 0
    name, rest = words[0], words[1:]
    with reported(f"dpo-fast {name}") as outcome:
        outcome.code = import_module(find_command(name).module).run(rest)
    return outcome.code


def find_command(name: str) -> Command:
    """The command of that name.

    Raises:
        UsageError: there is none; names the nearest.
    """
    from dpo_fast.cli.errors import UsageError, nearest

    if name not in COMMANDS:
        raise UsageError(
            f"there is no command {name!r}{nearest(name, COMMANDS)}; see `dpo-fast --help`."
        )
    return COMMANDS[name]


def help_text() -> str:
    """What ``dpo-fast --help`` prints."""
    lines = [f"  {name:<14}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"dpo-fast {__version__}: Direct Preference Optimization without logits",
            "",
            "usage: dpo-fast COMMAND [OPTIONS]",
            "       dpo-fast COMMAND --help",
            "",
            "commands:",
            *lines,
            "",
            "examples:",
            "  dpo-fast train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl \\",
            "      --reference precomputed --output_dir runs/first",
            "  dpo-fast train --config run.yaml --learning_rate 5e-7",
            "  dpo-fast doctor",
            "",
            "many devices: dpo-fast train --config run.yaml --accelerate-config fsdp2",
            "         (or: accelerate launch -m dpo_fast.cli train --config run.yaml)",
        ]
    )
