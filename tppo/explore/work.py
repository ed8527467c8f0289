"""What the page's processes compute. Everything here takes and returns plain data, and runs for at most a minute."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiling.errors import ConfigError, ToolkitError
from simulator.models import load_model
from simulator.plan import Question, answer
from simulator.plan.estimate import Estimate, estimate_of, played
from simulator.plan.first import first_estimate
from simulator.plan.options import Option, options_of
from tppo.explore.pictures import pictures_of


@dataclass(frozen=True)
class Known:
    """Of one option, from one simulation: of all of it, or of a part of its engines for a first estimate."""

    estimate: Estimate | str
    """Or why it cannot be run."""
    pictures: dict[str, Any]
    """Empty with a fault."""


def options(question: Question, most: int) -> list[Option]:
    """Raises ConfigError also when there are more than `most`."""
    found = options_of(question)
    if len(found) > most:
        raise ConfigError(
            f"{len(found)} options are more than the {most} that this page simulates at once; ask for fewer gpus, "
            "windows, factors or schedules, or use tppo plan"
        )
    return found


def first(option: Option) -> Known:
    assert option.experiment is not None
    try:
        estimate, part = first_estimate(option)
        return Known(estimate, pictures_of(part, engines=option.experiment.cluster.engines))
    except ToolkitError as error:
        return Known(str(error), {})


def simulated(option: Option) -> Known:
    try:
        result = played(option)
        return Known(estimate_of(option, result), pictures_of(result))
    except ToolkitError as error:
        return Known(str(error), {})


def answered(question: Question, known: Sequence[Estimate | str]) -> dict[str, Any]:
    """The same as `tppo plan --json` prints."""
    found = answer(question, estimates=lambda options, each: list(known))
    return {"question": question.model_dump(mode="json"), **found.as_dict()}


def report(chosen: Sequence[Option], folder: Path) -> bytes:
    """The report of these options, each simulated whole into a run directory under `folder`."""
    from analysis.report import write_report
    from profiling.reader import Run
    from simulator.run import simulate

    runs = []
    for option in chosen:
        assert option.experiment is not None
        path = folder / name_of(option)
        simulate(option.experiment).write(path)
        runs.append(Run(path))
    return write_report(runs, folder / "report.html").read_bytes()


def name_of(option: Option) -> str:
    """Of its run directory and its experiment file."""
    return f"{option.label.replace(' ', '-')}-{option.gpus}-gpus-tp{option.tensor_parallel}"


def size_of_model(path: Path) -> int:
    """Parameters of an uploaded config.json. Raises ConfigError as `tppo plan --model` does."""
    return load_model(path).parameters
