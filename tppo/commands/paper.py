"""`tppo paper`: the figures of the T-PPO paper's manner, from simulations and from the demo's measured runs."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from analysis.plot import plot
from profiling.console import PlainConsole
from profiling.errors import ConfigError, DataError, RunError
from profiling.reader import Run
from profiling.settings import parse_toml, to_toml
from profiling.writer import write_atomically
from simulator import load_experiment, simulate
from simulator.experiment import Experiment
from simulator.processes import in_processes
from tppo.paper import DEMO, OF_ALL, OF_THE_DEMO, OF_THE_PAIR, PAIR, SETTINGS, SIMULATED, experiments_of, load_paper
from tppo.paper.captions import Drawn, captions

FORMATS = ("pdf", "png")


def run_paper(
    output: Path, *, demo: Path, settings_file: Path = SETTINGS, jobs: int | None = None, train: bool = False
) -> Path:
    """Simulate what is not there yet, draw, write CAPTIONS.md and return its path. train: the demo runs first.
    Raises ConfigError or RunError, and DataError where nothing can be drawn."""
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: must be at least 1")
    settings = load_paper(settings_file)
    experiments = experiments_of(settings)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{output}: cannot be created: {error.strerror}; choose another --output") from None
    if train:
        from tppo.commands.demo import run_demo

        run_demo(demo, regime="short", seeds=range(3))
    simulated = output / "runs"
    runs = simulate_all(experiments, simulated, jobs)
    published = pd.DataFrame([number.model_dump() for number in settings.published])
    write_atomically(simulated / "published.csv", published.to_csv(index=False).encode())
    pair = [runs[name] for name in PAIR]
    drawn = [_draw(name, SIMULATED, pair, output) for name in OF_THE_PAIR]
    drawn += [_draw(name, SIMULATED, list(runs.values()), output) for name in OF_ALL]
    drawn += _of_the_demo(demo, output)
    command = f"tppo paper --output {output} --demo {demo}"
    if settings_file != SETTINGS:
        command += f" --settings {settings_file}"
    write_atomically(output / "CAPTIONS.md", captions(drawn, settings, command, output).encode())
    console = PlainConsole()
    for one in drawn:
        if one.reason is None:
            console.print(*one.files, sep="\n", markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(
                f"left out: {one.figure} ({one.source}): {one.reason}", markup=False, highlight=False, soft_wrap=True
            )
    if all(one.reason is not None for one in drawn):
        raise DataError(f"{output}: no figure can be drawn; remove {simulated}, so that it is simulated anew")
    return output / "CAPTIONS.md"


def simulate_all(experiments: dict[str, Experiment], folder: Path, jobs: int | None) -> dict[str, Run]:
    """Name -> finished run; those that `folder` holds stay as they are. Raises ConfigError when it holds others."""
    waiting = {name: own for name, own in experiments.items() if not _is_there(folder / name, own)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = PlainConsole(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("simulations", total=len(waiting))
        asked = {name: (own.model_dump_json(), folder / name) for name, own in waiting.items()}
        for _, done in in_processes(_play, asked, jobs):
            done()
            progress.advance(task)
    return {name: Run(folder / name) for name in experiments}


def _play(asked: tuple[str, Path]) -> None:
    """(experiment as JSON, its run directory), in another process. The directory has its name only once it is
    whole."""
    experiment, directory = asked
    partial = directory.with_name(f".{directory.name}.partial")
    if partial.is_symlink():
        partial.unlink()
    shutil.rmtree(partial, ignore_errors=True)
    simulate(load_experiment(json.loads(experiment))).write(partial)
    partial.rename(directory)


def _is_there(directory: Path, experiment: Experiment) -> bool:
    if not directory.exists():
        return False
    try:
        same = Run(directory).config == parse_toml(to_toml(experiment.model_dump(mode="json")))
    except DataError:
        same = False
    if not same:
        raise ConfigError(
            f"{directory}: holds something else than this set's run; choose another --output, or remove it"
        )
    return True


def _of_the_demo(demo: Path, output: Path) -> list[Drawn]:
    """Measured figures, or why there are none."""
    how = f"run `tppo demo --output {demo}` first, or add --train"
    found = sorted(path.parent for path in demo.glob("*/trace.jsonl"))
    runs = [run for run in map(Run, found) if not run.simulated and run.summary is not None]
    if not runs:
        return [Drawn(name, DEMO, [], reason=f"{demo} holds no finished measured run; {how}") for name in OF_THE_DEMO]
    return [_draw(name, DEMO, runs, output) for name in OF_THE_DEMO]


def _draw(figure: str, source: str, runs: Sequence[Run], output: Path) -> Drawn:
    """A figure that its runs cannot give is left out with the reason; the others do not suffer."""
    try:
        files = plot(runs, figure, FORMATS, output / source, look="paper")
    except DataError as error:
        return Drawn(figure, source, runs, reason=str(error))
    return Drawn(figure, source, runs, files)
