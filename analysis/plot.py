"""`tppo plot`: saves a figure, and beside it the numbers that it draws."""

import io
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from matplotlib import rc_context

from analysis import style
from analysis.figures import FIGURES
from profiling.errors import InputError, RunError
from profiling.reader import Run
from profiling.writer import write_atomically

FORMATS = ("png", "pdf", "svg")


def plot(runs: Sequence[Run], figure: str, formats: Sequence[str], output: Path) -> list[Path]:
    """Write output/NAME.{png,pdf,svg} and NAME.csv. Raises InputError for an unknown name or format (naming the
    nearest), DataError for runs that lack what the figure needs."""
    _known("figure", figure, list(FIGURES))
    for name in formats:
        _known("format", name, FORMATS)
    module = FIGURES[figure]
    table = module.data(runs)
    written = [output / f"{figure}.{name}" for name in formats]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{output}: cannot be created: {error.strerror}") from None
    with rc_context(style.RC):
        drawn = module.draw(table, runs)
        for path in written:
            buffer = io.BytesIO()
            drawn.savefig(buffer, format=path.suffix[1:])
            write_atomically(path, buffer.getvalue())
    write_atomically(output / f"{figure}.csv", table.to_csv(index=False).encode())
    return [*written, output / f"{figure}.csv"]


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise InputError(f"{what} '{name}' is not one of {', '.join(names)}{hint}")
