"""Problems of a data set as a task: read once, in an order that is a function of seed and epoch alone."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from profiling.errors import DataError
from tppo.config import SourceConfig
from tppo.data.layouts import layout_of
from tppo.data.problem import Problem
from tppo.data.prompts import Prompter, identities, problem_of
from tppo.data.tables import open_tables

PROMPTS_AT_ONCE = 1000
ARGUMENTS = ("prompt", "response", "answer")
"""Of a reward function, whatever the columns are called."""


@dataclass(frozen=True)
class Entry:
    problem: Problem
    identities: frozenset[str]
    """It is the problem of another data set where they share one."""
    prompt_tokens: int


@dataclass
class Counts:
    """Rows of a data set that were read, and those left out by why."""

    rows: int = 0
    repeated: int = 0
    unanswered: int = 0
    unreadable: int = 0
    """Their answers are nothing that the reward can compare with."""
    too_long: int = 0
    held_out: int = 0
    """Also in the held-out set."""

    def line(self, where: str, max_prompt_tokens: int) -> str | None:
        """What was left out, on one line; None when nothing was."""
        reasons = {
            "repeat an earlier problem": self.repeated,
            "lack a problem or an answer": self.unanswered,
            "have an answer that math-verify cannot read": self.unreadable,
            f"have prompts of more than {max_prompt_tokens} tokens": self.too_long,
            "are held out": self.held_out,
        }
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        return f"{where}: of {self.rows:,} rows {left_out}; these do not train" if left_out else None


def check_text(text: str, where: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character; mend the text") from None


def read_entries(
    source: SourceConfig,
    prompter: Prompter,
    max_prompt_tokens: int,
    *,
    key: str,
    all_columns: bool = False,
    unreadable: Callable[[Iterable[str]], set[str]] = lambda answers: set(),
) -> tuple[list[Entry], Counts]:
    """The distinct problems of a data set that have an answer and a prompt short enough, in the data's order.

    key: the section of the configuration that messages name. all_columns: keep the others with each problem.
    unreadable: which answers cannot be compared with. Raises DataError when none is left.
    """
    counts = Counts()
    seen: dict[str, tuple[Problem, frozenset[str]]] = {}
    why = ""
    for table in open_tables(source.path, split=source.split, subset=source.subset, key=key):
        layout = layout_of(
            table, source.layout, prompt_column=source.prompt_column, answer_column=source.answer_column, key=key
        )
        for row in table.rows(table.columns if all_columns else layout.columns):
            counts.rows += 1
            text = problem_of(row[layout.problem], f"{table.where}: row {counts.rows}")
            answer = layout.answer_of(row)
            if text is None or answer is None:
                counts.unanswered += 1
                if answer is None and not why:
                    why = f"; in row {counts.rows} {layout.why_not(row)}, and {layout.answer} is wanted"
                continue
            identity = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
            if identity in seen:
                counts.repeated += 1
                continue
            check_text(identity + answer, f"{table.where}: row {counts.rows}")
            others = {name: value for name, value in row.items() if name not in (layout.problem, *ARGUMENTS)}
            columns = json.dumps(others, default=str) if all_columns else "{}"
            problem = Problem(prompter.prompt(text), answer, not prompter.chat, columns)
            seen[identity] = problem, identities(text, prompter.template)
    if not counts.rows:
        raise DataError(f"{key}.path = {source.path!r}, split {source.split!r}: holds no rows")
    bad = unreadable(problem.answer for problem, _ in seen.values())
    kept = [(problem, known_by) for problem, known_by in seen.values() if problem.answer not in bad]
    counts.unreadable = len(seen) - len(kept)
    entries = [
        Entry(problem, known_by, tokens)
        for (problem, known_by), tokens in zip(kept, _lengths(prompter, [each for each, _ in kept]), strict=True)
    ]
    short = [entry for entry in entries if entry.prompt_tokens <= max_prompt_tokens]
    counts.too_long = len(entries) - len(short)
    if not short:
        raise DataError(
            f"{key}.path = {source.path!r}: of {counts.rows} rows {counts.unanswered} lack a problem or an answer, "
            f"{counts.unreadable} have an answer that math-verify cannot read and {counts.too_long} have prompts of "
            f"more than data.max_prompt_tokens = {max_prompt_tokens}; none is left{why}: check {key}.layout, "
            f"{key}.prompt_column and {key}.answer_column, set reward.kind, or raise data.max_prompt_tokens"
        )
    return short, counts


def _lengths(prompter: Prompter, problems: Sequence[Problem]) -> Iterable[int]:
    for first in range(0, len(problems), PROMPTS_AT_ONCE):
        some = [problem.prompt for problem in problems[first : first + PROMPTS_AT_ONCE]]
        yield from map(len, prompter.tokenizer(some, add_special_tokens=not prompter.chat)["input_ids"])


@dataclass
class DatasetTask:
    """Problem i is row p(i mod n) of epoch i div n, where p is a permutation drawn from (seed, epoch): going on needs
    nothing but the number of the next problem."""

    problems: Sequence[Problem]
    seed: int
    shuffle: bool
    longest_prompt_tokens: int
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)
    """Epoch and permutation of the last problem that was asked for."""

    def problem(self, number: int) -> Problem:
        epoch, position = divmod(number, len(self.problems))
        return self.problems[self.order(epoch)[position] if self.shuffle else position]

    def order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.problems))
        return self._order[1]

    def longest_prompt(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self.longest_prompt_tokens
