"""`tppo report`: what a simulation says of each arm's first run goes into its directory, then the page is written."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from analysis.report import write_report
from analysis.tables import by_arm
from profiling.advice import NAME, Advice, read_advice, write_advice
from profiling.errors import DataError, RunError, ToolkitError
from profiling.reader import Run
from simulator.advice import advise

LARGE_BYTES = 20_000_000
"""Of runs' traces: with more, simulating takes longer than another process does to start."""


def run_report(paths: Sequence[Path], output: Path) -> Path:
    runs = [Run(path) for path in paths]
    words = ["tppo", "report", *map(shown, paths), "--output", shown(output)]
    with advice_beside(runs) as advice:
        return write_report(runs, output, advice=advice, command=shlex.join(words))


@contextmanager
def advice_beside(runs: Sequence[Run]) -> Iterator[Callable[[], dict[Path, Advice]]]:
    """`advice_of` of the runs, to be asked for when it is needed: another process simulates meanwhile where that
    pays."""
    traces = [run.path / "trace.jsonl" for run in runs]
    if os.cpu_count() == 1 or sum(path.stat().st_size for path in traces if path.is_file()) < LARGE_BYTES:
        yield lambda: advice_of(runs)
        return
    with ProcessPoolExecutor(1, get_context("spawn"), _leave_ctrl_c_to_the_parent) as pool:
        found = pool.submit(_advice_at, [run.path for run in runs])

        def wait() -> dict[Path, Advice]:
            try:
                return found.result()
            except BrokenProcessPool:
                warn("no advice on the window: the process that simulates was ended")
                return {}

        yield wait


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _advice_at(paths: Sequence[Path]) -> dict[Path, Advice]:
    return advice_of([Run(path) for path in paths])


def advice_of(runs: Sequence[Run]) -> dict[Path, Advice]:
    """By path, of the first run of each arm that has ended (or the first): what its advice.json says, written now
    where it is missing, damaged or older than the run. One that cannot be written is warned of, nothing else."""
    found = {}
    for members in by_arm(runs).values():
        run = next((run for run in members if run.summary is not None), members[0])
        try:
            known = read_advice(run.path)
        except DataError as error:
            warn(f"{error}; it is written anew")
            known = None
        if known is None:
            known = _fresh(run)
        if known is not None:
            found[run.path] = known
    return found


def _fresh(run: Run) -> Advice | None:
    try:
        advice = advise(run)
    except ToolkitError as error:  # what is wrong with the run itself is told by the report
        warn(f"no advice on the window: {error}")
        return None
    try:
        write_advice(run.path, advice)
    except RunError as error:
        warn(f"{error}; {NAME} is not kept, the report has it all the same")
    return advice


def warn(text: str) -> None:
    print(f"tppo report: {text}", file=sys.stderr)


def shown(path: Path) -> str:
    """As it was typed; an absolute path as seen from here or from home: a report is sent to others."""
    if not path.is_absolute():
        return str(path)
    for base, prefix in ((Path.cwd(), Path()), (Path.home(), Path("~"))):
        if path.is_relative_to(base) and base != Path("/"):
            return str(prefix / path.relative_to(base))
    return str(Path("...") / path.name)
