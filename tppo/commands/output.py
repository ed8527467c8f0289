"""Where tables go."""

from rich.console import Console

WIDTH = 170
"""Of a table that goes to a file or a pipe, where nobody has a window to fit it to."""


def table_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
