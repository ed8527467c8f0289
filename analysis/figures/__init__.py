"""One figure a file. `NAME(runs)` returns a matplotlib Figure; `FIGURES["NAME"].data(runs)` what it draws."""

from collections.abc import Callable, Sequence
from types import ModuleType

from matplotlib.figure import Figure

from analysis import style
from analysis.figures import (
    _accuracy_steps,
    _accuracy_time,
    _accuracy_tokens,
    _energy,
    _idle_ledger,
    _length_distribution,
    _predicted_measured,
    _response_length,
    _roofline,
    _staleness,
    _step_timeline,
)
from profiling.reader import Run

FIGURES: dict[str, ModuleType] = {
    "accuracy_time": _accuracy_time,
    "accuracy_steps": _accuracy_steps,
    "accuracy_tokens": _accuracy_tokens,
    "response_length": _response_length,
    "length_distribution": _length_distribution,
    "staleness": _staleness,
    "step_timeline": _step_timeline,
    "idle_ledger": _idle_ledger,
    "energy": _energy,
    "roofline": _roofline,
    "predicted_measured": _predicted_measured,
}
"""Name -> module with data(runs), draw(table, runs) and CAPTION."""


def first_line(name: str) -> str:
    """What a figure shows, in a line."""
    return (FIGURES[name].__doc__ or "").strip().splitlines()[0]


def _figure(module: ModuleType) -> Callable[[Sequence[Run]], Figure]:
    def draw(runs: Sequence[Run]) -> Figure:
        table = module.data(runs)
        with style.settings():
            return module.draw(table, runs)

    draw.__doc__ = module.__doc__
    return draw


accuracy_time = _figure(_accuracy_time)
accuracy_steps = _figure(_accuracy_steps)
accuracy_tokens = _figure(_accuracy_tokens)
response_length = _figure(_response_length)
length_distribution = _figure(_length_distribution)
staleness = _figure(_staleness)
step_timeline = _figure(_step_timeline)
idle_ledger = _figure(_idle_ledger)
energy = _figure(_energy)
roofline = _figure(_roofline)
predicted_measured = _figure(_predicted_measured)
