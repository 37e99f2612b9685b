"""Progress of a long pass: a bar on a terminal, a line every ten seconds elsewhere."""

import logging
import sys
import time
from typing import Any

logger = logging.getLogger("dpo_fast")

LINE_SECONDS = 10.0


class Progress:
    """Context manager that counts rows and tokens.

    Args:
        total: rows to come. name: of the dataset. show: False keeps silent (other ranks).
    """

    def __init__(self, total: int, name: str, *, show: bool = True) -> None:
        self.total, self.name, self.show = total, name, show
        self.rows = self.tokens = 0
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._last = time.monotonic()
        if self.show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, unit="pair", desc=f"Reference log-probs, {self.name}"
            )
        return self

    def advance(self, rows: int, tokens: int) -> None:
        """``rows`` more are done, with ``tokens`` tokens in their sequences."""
        self.rows += rows
        self.tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.tokens / max(now - self._start, 1e-9):,.0f} tokens/s")
            self._bar.update(rows)
        elif self.show and now - self._last >= LINE_SECONDS:
            self._last = now
            logger.info("%s", self.line(now))

    def line(self, now: float | None = None) -> str:
        """Where it stands, with rates and the time to go."""
        seconds = max((time.monotonic() if now is None else now) - self._start, 1e-9)
        rate = self.rows / seconds
        left = (self.total - self.rows) / rate if rate else float("inf")
        return (
            f"Reference log-probs of {self.name!r}: {self.rows:,} of {self.total:,} pairs, "
            f"{rate:,.1f} pairs/s, {self.tokens / seconds:,.0f} tokens/s, {left:,.0f} s to go"
        )

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.show and kind is None:
            seconds = max(time.monotonic() - self._start, 1e-9)
            logger.info(
                "Reference log-probs of %r: %s pairs in %.1f s (%s tokens/s).",
                self.name,
                f"{self.rows:,}",
                seconds,
                f"{self.tokens / seconds:,.0f}",
            )
