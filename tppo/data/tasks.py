"""What a configuration trains and evaluates on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from profiling.errors import ConfigError
from tppo.config import RunConfig, SourceConfig
from tppo.data.arithmetic import ArithmeticTask
from tppo.data.dataset import Counts, DatasetTask, Entry, read_entries
from tppo.data.problem import Problem, Task
from tppo.data.prompts import Prompter, prompter_of
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.rewards.golds import unreadable

MOST_PROBLEMS = 1_000_000
"""Of the arithmetic task, held out: all of them are in memory."""


@dataclass(frozen=True)
class Problems:
    task: Task
    held_out: list[Problem]
    fingerprint: str | None
    """Of a data set's problems, so that a resumed run can tell whether they are still the same."""
    notes: list[str]
    """One line about each data set of which something was left out."""


def problems_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = SINGLE) -> Problems:
    """Raises ConfigError or DataError when there is nothing to train on."""
    if config.data.task == "dataset":
        return dataset_problems(config, tokenizer, ranks)
    held_out = arithmetic_task(config, config.evaluation.seed)
    if config.evaluation.problems > MOST_PROBLEMS:
        raise ConfigError(
            f"evaluation.problems = {config.evaluation.problems}: more than {MOST_PROBLEMS:,} are not made; lower it"
        )
    numbers = range(config.evaluation.problems)
    return Problems(arithmetic_task(config), [held_out.problem(number) for number in numbers], None, [])


def evaluation_problems(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """What is held out, without what trains where that is another data set."""
    data, evaluation = config.data, config.evaluation
    if data.task == "dataset" and evaluation.path:
        entries, _ = _read(config, evaluation, _evaluation_prompter(config, tokenizer), "evaluation", SINGLE)
        return [entry.problem for entry in _drawn(entries, evaluation.problems, evaluation.seed)]
    return problems_of(config, tokenizer).held_out


def arithmetic_task(config: RunConfig, seed: int | None = None) -> ArithmeticTask:
    data = config.data
    try:
        return ArithmeticTask(
            median_steps=data.median_steps,
            sigma=data.sigma,
            max_steps=data.max_steps,
            seed=data.seed if seed is None else seed,
        )
    except ValueError as error:
        raise ConfigError(f"data.{error}") from None


def dataset_problems(config: RunConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = SINGLE) -> Problems:
    """The data set less what is held out: that of [evaluation], or else a part of it that `evaluation.seed` draws.
    Raises ConfigError."""
    data, evaluation = config.data, config.evaluation
    prompter = prompter_of(tokenizer, data.system_prompt, data.prompt_template, data.chat_template)
    entries, counts = _read(config, data, prompter, "data", ranks)
    notes = []
    held_out: list[Entry] = []
    if evaluation.every and evaluation.path:
        others, other_counts = _read(config, evaluation, _evaluation_prompter(config, tokenizer), "evaluation", ranks)
        held_out = _drawn(others, evaluation.problems, evaluation.seed)
        notes.append(other_counts.line(f"evaluation.path = {evaluation.path!r}", data.max_prompt_tokens))
    elif evaluation.every:
        if evaluation.problems >= len(entries):
            raise ConfigError(
                f"evaluation.problems = {evaluation.problems}: data.path = {data.path!r} has {len(entries)} problems, "
                "and none would be left to train on; lower it, or set evaluation.path"
            )
        held_out = _drawn(entries, evaluation.problems, evaluation.seed)
    withheld = {identity for entry in held_out for identity in entry.identities}
    training = [entry for entry in entries if withheld.isdisjoint(entry.identities)]
    counts.held_out = len(entries) - len(training)
    if not training:
        raise ConfigError(
            f"data.path = {data.path!r}: all of its problems are in evaluation.path = {evaluation.path!r}; train on "
            "others"
        )
    notes.append(counts.line(f"data.path = {data.path!r}", data.max_prompt_tokens))
    longest = max(entry.prompt_tokens for entry in [*training, *held_out])
    task = DatasetTask([entry.problem for entry in training], data.seed, data.shuffle, longest)
    fingerprint = _fingerprint([entry.problem for entry in [*training, *held_out]])
    return Problems(task, [entry.problem for entry in held_out], fingerprint, [note for note in notes if note])


def _evaluation_prompter(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prompter:
    """Raises ConfigError."""
    data, own = config.data, config.evaluation.prompt_template
    template = data.prompt_template if own is None else own
    return prompter_of(tokenizer, data.system_prompt, template, data.chat_template)


def _read(
    config: RunConfig, source: SourceConfig, prompter: Prompter, key: str, ranks: Ranks
) -> tuple[list[Entry], Counts]:
    """One rank says which answers cannot be read, so that all leave out the same rows. Raises ConfigError or
    DataError."""
    return read_entries(
        source, prompter, config.data.max_prompt_tokens, key=key, all_columns=config.reward.kind == "python",
        unreadable=lambda answers: ranks.from_first(lambda: unreadable(answers, config)),
    )  # fmt: skip


def _drawn(entries: Sequence[Entry], number: int, seed: int) -> list[Entry]:
    """`number` of them, all where there are fewer, in the data's order."""
    chosen = np.random.default_rng(seed).permutation(len(entries))[:number]
    return [entries[index] for index in sorted(chosen)]


def _fingerprint(problems: Sequence[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{len(problem.prompt)} {problem.prompt}{len(problem.answer)} {problem.answer}".encode())
    return digest.hexdigest()[:16]
