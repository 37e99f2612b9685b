"""Tables of a command: drawn on a terminal, aligned plain text elsewhere (files, pipes, logs)."""

import sys
from collections.abc import Iterator, Sequence

Row = Sequence[str]


def print_table(title: str, headers: Row, rows: Sequence[Row], *, left: int = 1) -> None:
    """Print rows under headers; the first ``left`` columns are text, the others numbers."""
    if not sys.stdout.isatty():
        print("\n".join(plain_lines(title, headers, rows, left=left)))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, name in enumerate(headers):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def plain_lines(title: str, headers: Row, rows: Sequence[Row], *, left: int = 1) -> Iterator[str]:
    """The table without colours and frames, a line at a time."""
    cells = [headers, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    if title:
        yield title
    for row in cells:
        parts = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(parts).rstrip()
