"""The command `dpo-fast`: one module a command, loaded when that command runs."""

from dpo_fast.cli.app import COMMANDS, main

__all__ = ["COMMANDS", "main"]
