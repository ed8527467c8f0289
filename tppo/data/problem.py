"""What a run trains on: problems by number, each with an answer that a reward knows how to check."""

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from profiling.errors import DataError, shown


@dataclass(frozen=True)
class Problem:
    prompt: str
    """The text that the model continues, a chat template already applied."""
    answer: str
    special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens; a chat template has put them in already."""
    columns: str = "{}"
    """The row's further columns as a JSON object, where reward.kind is python."""


class Task(Protocol):
    """Problem number i is a function of i and the task's settings alone, so that every run sees the same rows, and
    the position in the data is the number of the next row."""

    def problem(self, number: int) -> Problem: ...

    def longest_prompt(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the longest prompt, special ones included."""
        ...


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """Raises DataError where the tokenizer makes nothing of the prompt: an engine has nothing to go on from."""
    ids = tokenizer(problem.prompt, add_special_tokens=problem.special_tokens)["input_ids"]
    if not ids:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer makes no tokens of the prompt {shown(problem.prompt)}; "
            "is its tokenizer.json whole?"
        )
    return ids
