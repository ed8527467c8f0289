"""Questions answered with as few simulations as possible: what an option costs is kept, and only what is new runs."""

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from profiling.errors import ConfigError, RunError
from simulator.plan import Question
from simulator.plan.options import Option
from tppo.explore import work
from tppo.explore.workers import Workers

MOST_OPTIONS = 48
"""Of one question."""
MOST_AT_ONCE = 8
"""Questions that are worked on or wait; more are refused."""
MOST_KEPT = 300
"""Options whose simulations are remembered, and as many whose first estimates are."""
MOST_SHOWN = 4
"""Options that are drawn, or reported on, together."""
LIMIT_S = 60.0
"""Of one simulation or report."""


class Busy(RunError):
    pass


class Planner:
    def __init__(self, folder: Path, *, limit_s: float = LIMIT_S) -> None:
        self._folder = folder
        self._workers = Workers("tppo.explore.work", limit_s=limit_s)
        self._whole, self._early = _Kept(self._workers, work.simulated), _Kept(self._workers, work.first)
        self._at_once = 0

    def close(self) -> None:
        self._workers.close()

    async def answer(self, question: Question) -> dict[str, Any]:
        """Raises what `simulator.plan.answer` raises, RunError after LIMIT_S, and Busy."""
        with _Turn(self):
            return await self._answered(question, await self._all(await self._options(question)))

    async def first(self, question: Question) -> tuple[dict[str, Any], bool]:
        """(an answer, whether it is the whole one): with first estimates of the options that are not known yet.
        Raises as `answer` does."""
        with _Turn(self):
            options = await self._options(question)
            answer = await self._answered(question, await self._all(options, first=True))
            return answer, all(option in self._whole for option in options)

    async def pictures(self, question: Question, places: Sequence[int], *, first: bool) -> list[dict[str, Any]]:
        """Of the options at these places of the (first) answer; empty for one that cannot be run."""
        with _Turn(self):
            options = await self._chosen(question, places)
            known = await self._all(options, first=first)
        return [
            {"place": place, "gpus": option.gpus, "schedule": option.label,
             "gpu_seconds": None if isinstance(own.estimate, str) else own.estimate.gpu_seconds, **own.pictures}
            for place, option, own in zip(places, options, known, strict=True)
        ]  # fmt: skip

    async def option(self, question: Question, place: int) -> Option:
        """Raises ConfigError for one that has no experiment."""
        with _Turn(self):
            (found,) = await self._chosen(question, [place])
        if found.experiment is None:
            raise ConfigError(f"{found.label} on {found.gpus} GPUs: {found.fault}")
        return found

    async def report(self, question: Question, places: Sequence[int]) -> bytes:
        with _Turn(self), tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as own:
            chosen = [option for option in await self._chosen(question, places) if option.experiment is not None]
            if not chosen:
                raise ConfigError("none of the chosen options can be run; choose others")
            return await self._workers.run(work.report, chosen, Path(own))

    async def size_of_model(self, path: Path) -> int:
        with _Turn(self):
            return await self._workers.run(work.size_of_model, path)

    async def _options(self, question: Question) -> list[Option]:
        return await self._workers.run(work.options, question, MOST_OPTIONS)

    async def _chosen(self, question: Question, places: Sequence[int]) -> list[Option]:
        options = await self._options(question)
        if not places or len(places) > MOST_SHOWN or not all(0 <= place < len(options) for place in places):
            raise ConfigError(f"shown: choose 1 to {MOST_SHOWN} of the {len(options)} options by their place from 0")
        return [options[place] for place in places]

    async def _answered(self, question: Question, known: Sequence[work.Known]) -> dict[str, Any]:
        return await self._workers.run(work.answered, question, [own.estimate for own in known])

    async def _all(self, options: Sequence[Option], *, first: bool = False) -> list[work.Known]:
        """first: with a first estimate where the whole simulation is not known yet."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task((self._early if first and option not in self._whole else self._whole).of(option))
                for option in options
            ]
        return [task.result() for task in tasks]


class _Kept:
    """What a job finds of options, each asked once and remembered."""

    def __init__(self, workers: Workers, job: Callable[[Option], work.Known]) -> None:
        self._workers, self._job = workers, job
        self._known: OrderedDict[str, work.Known] = OrderedDict()

    def __contains__(self, option: Option) -> bool:
        """It takes no job: it is remembered, or it cannot be run."""
        return option.experiment is None or _key(option) in self._known

    async def of(self, option: Option) -> work.Known:
        if option.experiment is None:
            return work.Known(str(option.fault), {})
        key = _key(option)
        if key not in self._known:
            try:
                self._known[key] = await self._workers.run(self._job, option)
            except RunError as error:  # the other options are answered all the same
                return work.Known(str(error), {})
        self._known.move_to_end(key)
        found = self._known[key]
        while len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)
        return found


def _key(option: Option) -> str:
    assert option.experiment is not None
    return f"{option.label} {option.experiment.model_dump_json()}"


class _Turn:
    """One of the questions that are worked on at once."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def __enter__(self) -> None:
        if self._planner._at_once >= MOST_AT_ONCE:
            raise Busy(f"{MOST_AT_ONCE} questions are being worked on; ask again in a few seconds")
        self._planner._at_once += 1

    def __exit__(self, *error: object) -> None:
        self._planner._at_once -= 1
