"""Where tables go, and how they look."""

from rich.console import Console
from rich.table import Table

WIDTH = 170
"""Of a table that goes to a file or a pipe, where nobody has a window to fit it to."""
NAMES = ("device", "phase", "cause")
"""Columns of text; the others are numbers."""


def table_console() -> Console:
    """Names are printed as they are: a phase may be called data[bf16]."""
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(markup=False, emoji=False, width=WIDTH)


def plain_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in NAMES else "right")
    return table
