"""What a user sees when something is wrong: one message with the remedy, not a page of frames."""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

TRACEBACK_VARIABLE = "DPO_FAST_TRACEBACK"

# Raised in dpo_fast with a message for the user; others, and the same ones raised elsewhere, are
# shown with their frames.
_EXPLAINED = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


class UsageError(ValueError):
    """The command line, the config file or a path in them is wrong; exit code 2."""


@dataclass
class Outcome:
    """Filled in by the body of :func:`reported`, or by an error."""

    code: int = 0


@contextmanager
def reported(command: str) -> Iterator[Outcome]:
    """Turn errors that explain themselves into a message on stderr and an exit code.

    Errors that come from elsewhere than dpo_fast pass through, with their frames; all do when
    ``DPO_FAST_TRACEBACK=1``.
    """
    outcome = Outcome()
    try:
        yield outcome
    except SystemExit as done:  # argparse: 0 after --help, 2 after a message of its own
        outcome.code = done.code if isinstance(done.code, int) else 1
    except KeyboardInterrupt as stop:
        _say(command, str(stop) or "interrupted")
        outcome.code = 130
    except UsageError as error:
        _say(command, f"error: {error}")
        outcome.code = 2
    except Exception as error:
        shown = os.environ.get(TRACEBACK_VARIABLE) == "1"
        if shown or not _is_explained(error) or not _is_ours(error.__traceback__):
            raise
        _say(command, f"error: {error}\n({TRACEBACK_VARIABLE}=1 shows where it was raised)")
        outcome.code = 1


def _is_explained(error: Exception) -> bool:
    """Whether the message was written for the user: by type, or a type of dpo_fast itself."""
    own = type(error).__module__.partition(".")[0] == "dpo_fast"
    return own or isinstance(error, _EXPLAINED)


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the error was raised in a file of dpo_fast."""
    name = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name.partition(".")[0] == "dpo_fast"


def _say(command: str, text: str) -> None:
    print(f"{command}: {text}", file=sys.stderr)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean a or b?"`` for the known names that look like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if not close:
        return ""
    return f"; did you mean {' or '.join(prefix + one for one in close)}?"
