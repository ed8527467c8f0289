"""transformers' Trainer and TRL's trainers, which build on it: `Trainer(..., callbacks=[PhaseCallback()])`.

A callback sees the edges of steps, evaluations and saves, nothing inside of a step: generation and update of a TRL
step are one phase, `step`.
"""

import os
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from profiling.markers import VARIABLE, mark


class PhaseCallback(TrainerCallback):
    """Does nothing where the program is not profiled."""

    def __init__(self) -> None:
        self._directory = os.environ.get(VARIABLE)
        self._began: float | None = None
        self._idle_since: float | None = None
        """The end of the last step: evaluations and saves come between steps."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._idle_since = time.perf_counter()
        self._mark("step", state, self._began)
        self._began = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._mark("evaluation", state, self._idle_since)
        self._idle_since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self._mark("checkpoint", state, self._idle_since)
        self._idle_since = time.perf_counter()

    def _mark(self, name: str, state: TrainerState, since: float | None) -> None:
        if self._directory and since is not None:
            mark(self._directory, name, int(state.global_step), since, time.perf_counter())
