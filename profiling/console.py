"""Where tables go, and how they look."""

from collections.abc import Collection, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

WIDTH = 170
"""Of a table that goes to a file or a pipe, where nobody has a window to fit it to."""
NAMES = ("device", "phase", "cause")
"""Columns of text; the others are numbers."""


class PlainConsole(Console):
    """Prints names as they are: a phase may be called data[bf16]. What could steer a terminal is shown as \ufffd."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def printable(text: str) -> str:
    """With \ufffd for what is not; line ends stay."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def table_console() -> Console:
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=WIDTH)


def plain_table(title: str, *columns: str, left: Collection[str] = NAMES) -> Table:
    """left: columns of text. In a narrow window cells are folded: a number that is cut off says another one."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table
