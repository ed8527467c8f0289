"""The responses of one evaluation, graded: their table, and the metrics that training records of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tppo.evaluation.statistics import Answers, Estimate, sizes, standard_error, summarise


@dataclass(frozen=True)
class Graded:
    """n responses to each of some problems."""

    tokens: Int[np.ndarray, "problems samples"]
    """Of the response, its stop token included."""
    finished: Bool[np.ndarray, "problems samples"]
    """It ended with a stop token."""
    cut: Bool[np.ndarray, "problems samples"]
    """It hit the maximum. Neither this nor `finished`: the engine gave it up."""
    correct: Bool[np.ndarray, "problems samples"]
    answers: Answers

    @property
    def problems(self) -> int:
        return self.correct.shape[0]

    @property
    def samples(self) -> int:
        return self.correct.shape[1]

    @property
    def mean(self) -> float:
        """Share of correct responses, avg@n."""
        return int(self.correct.sum()) / self.correct.size

    @property
    def stderr(self) -> float:
        return standard_error(self.correct)

    @cached_property
    def estimates(self) -> dict[str, Estimate | None]:
        return summarise(self.correct, self.answers)

    def columns(self, step: int | None) -> dict[str, Any]:
        """The columns of profiling.schema.EVALUATIONS, problem by problem."""
        problem, sample = np.indices(self.correct.shape)
        return {
            "step": [step] * self.correct.size,
            "problem": problem.ravel(),
            "sample": sample.ravel(),
            "tokens": self.tokens.ravel(),
            "finished": self.finished.ravel(),
            "correct": self.correct.ravel(),
            "answer": [answer for row in self.answers for answer in row],
        }


def validation_metrics(graded: Graded) -> dict[str, float | None]:
    """What a row of metrics.jsonl says of an evaluation. val/accuracy is avg@n; with one sample a problem the others
    would be copies of it and are left out. val/response_length/clip_ratio: responses that hit the maximum / all."""
    metrics: dict[str, float | None] = {
        "val/accuracy": graded.mean,
        "val/accuracy_stderr": graded.stderr,
        "val/response_length/mean": float(graded.tokens.mean()),
        "val/response_length/clip_ratio": float(graded.cut.mean()),
    }
    if graded.samples > 1:
        found = graded.estimates
        metrics |= {f"val/{name}": None if estimate is None else estimate.value for name, estimate in found.items()}
    return metrics


def validation_names(samples: int) -> list[str]:
    """The metrics' names, which are null in a step without an evaluation."""
    names = ["accuracy", "accuracy_stderr", "response_length/mean", "response_length/clip_ratio"]
    if samples > 1:
        votes = [f"maj@{k}" for k in sizes(samples) if k > 1]
        names += [f"avg@{samples}", *(f"pass@{k}" for k in sizes(samples)), *votes]
    return [f"val/{name}" for name in names]
