"""`tppo plot`: saves figures, and beside each the numbers that it draws."""

import io
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from analysis import style
from analysis.figures import FIGURES, first_line
from profiling.errors import DataError, InputError, RunError
from profiling.reader import Run
from profiling.writer import write_atomically

FORMATS = ("png", "pdf", "svg")
ALL = "all"


def plot(
    runs: Sequence[Run], figure: str, formats: Sequence[str], output: Path, *, look: str = "screen"
) -> list[Path]:
    """Write output/NAME.{png,pdf,svg} and NAME.csv in a style. Raises InputError for an unknown name, format or style
    (naming the nearest), DataError for runs that lack what the figure needs."""
    _check(runs, [figure], formats, look)
    return _save(runs, figure, formats, output, look)


def plot_all(
    runs: Sequence[Run], formats: Sequence[str], output: Path, *, look: str = "screen"
) -> tuple[list[Path], dict[str, str]]:
    """Every figure that the runs allow, and of each other one the reason. Raises DataError when there is none."""
    _check(runs, [], formats, look)
    written: list[Path] = []
    left_out = {}
    for figure in FIGURES:
        try:
            written += _save(runs, figure, formats, output, look)
        except DataError as error:
            left_out[figure] = str(error)
    if not written:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise DataError(f"no figure can be drawn of these runs; {reasons}")
    return written, left_out


def listed() -> Iterator[str]:
    """A line per figure: its name, and what it shows."""
    width = max(map(len, FIGURES))
    for name in FIGURES:
        yield f"{name:{width}}  {first_line(name)}"


def _save(runs: Sequence[Run], figure: str, formats: Sequence[str], output: Path, look: str) -> list[Path]:
    module = FIGURES[figure]
    table = module.data(runs)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{output}: cannot be created: {error.strerror}") from None
    written = [output / f"{figure}.{name}" for name in formats]
    with style.use(look):
        drawn = module.draw(table, runs)
        for path in written:
            buffer = io.BytesIO()
            drawn.savefig(buffer, format=path.suffix[1:])
            write_atomically(path, buffer.getvalue())
    write_atomically(output / f"{figure}.csv", table.to_csv(index=False).encode(errors="backslashreplace"))
    return [*written, output / f"{figure}.csv"]


def _check(runs: Sequence[Run], figures: Sequence[str], formats: Sequence[str], look: str) -> None:
    paths: dict[str, Path] = {}
    for run in runs:
        if run.name in paths:
            raise InputError(f"{run.path}: has the name of {paths[run.name]}; figures tell runs by name: rename one")
        paths[run.name] = run.path
    for name in figures:
        _known("figure", name, list(FIGURES))
    for name in formats:
        _known("format", name, FORMATS)
    _known("style", look, list(style.STYLES))


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise InputError(f"{what} '{name}' is not one of {', '.join(names)}{hint}")
