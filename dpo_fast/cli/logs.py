"""Where the library's log lines go when it runs as a command: stderr of the main process."""

import logging
import os
import sys
from typing import TextIO


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment: a live progress display redirects it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def is_main_process() -> bool:
    """Rank 0 of the launcher, or no launcher."""
    return os.environ.get("RANK", "0") == "0"


def show_logs() -> None:
    """Show dpo_fast's lines: all from rank 0, errors from the others. Twice changes nothing.

    Called before anything of Hugging Face is imported: without a terminal their bars, which
    rewrite a line many times a second, are off or slow.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    logger = logging.getLogger("dpo_fast")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
