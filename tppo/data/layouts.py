"""Which columns of a table are problem and answer, and how the answer is read out of its column.

gsm8k          question, answer: the number behind the last "####"
math           problem, and answer (MATH-500) or else the last \\boxed{...} of solution
dapo-math-17k  prompt: a list of chat messages; answer: reward_model.ground_truth (verl's layout)
aime-2024      problem and answer, or verl's layout
aime-2025      question or problem, and answer
columns        data.prompt_column and data.answer_column
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from profiling.errors import DataError, shown
from tppo.data.boxed import last_boxed
from tppo.data.tables import Table

ReadAnswer = Callable[[Any], str | None]
NAMES = ("gsm8k", "math", "dapo-math-17k", "aime-2024", "aime-2025", "columns")


@dataclass(frozen=True)
class Layout:
    name: str
    problem: str
    """Column of the problem: text, or chat messages."""
    answer: str
    """Column of the answer; a dot steps into it: reward_model.ground_truth."""
    read_answer: ReadAnswer

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys((self.problem, self.answer_column)))

    @property
    def answer_column(self) -> str:
        return self.answer.split(".")[0]

    def answer_of(self, row: dict[str, Any]) -> str | None:
        """None where the row has no answer."""
        value = row[self.answer_column]
        for key in self.answer.split(".")[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        return self.read_answer(value)

    def why_not(self, row: dict[str, Any]) -> str:
        """Of a row without an answer: what is there instead."""
        path, value = self.answer_column, row[self.answer_column]
        for key in self.answer.split(".")[1:]:
            if not isinstance(value, dict) or key not in value:
                break
            path, value = f"{path}.{key}", value[key]
        if path != self.answer and isinstance(value, dict):
            return f"{path} has {', '.join(map(str, value)) or 'no keys'}"
        return f"{path} is {shown(value)}"


def plain_answer(value: Any) -> str | None:
    """Text or a number; 72.0, as a table of numbers with gaps has it, is 72."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value).strip() or None


def after_hashes(value: Any) -> str | None:
    """GSM8K's `working #### 1,234`, without the thousands separators."""
    if not isinstance(value, str) or "####" not in value:
        return None
    return value.rsplit("####", 1)[1].strip().replace(",", "") or None


def boxed_answer(value: Any) -> str | None:
    return last_boxed(value) if isinstance(value, str) else None


GSM8K = Layout("gsm8k", "question", "answer", after_hashes)
MATH = Layout("math", "problem", "solution", boxed_answer)
MATH_500 = Layout("math", "problem", "answer", plain_answer)
VERL = Layout("dapo-math-17k", "prompt", "reward_model.ground_truth", plain_answer)
AIME = (
    Layout("aime-2024", "problem", "answer", plain_answer),
    Layout("aime-2024", "Problem", "Answer", plain_answer),
    Layout("aime-2025", "question", "answer", plain_answer),
)
OF_NAME = {
    "gsm8k": (GSM8K,),
    "math": (MATH_500, MATH),
    "dapo-math-17k": (VERL,),
    "aime-2024": (*AIME[:2], VERL),
    "aime-2025": (AIME[2], AIME[0], AIME[1], VERL),
}
AUTOMATIC = (VERL, GSM8K, *AIME, MATH)
"""In this order; GSM8K only where the answers have its hashes."""


def layout_of(table: Table, name: str, *, prompt_column: str, answer_column: str, key: str) -> Layout:
    """The layout called `name`, or that of the columns. key: the section that messages name.

    Raises DataError naming the table, its columns and the key to set.
    """
    have = f"its columns are {', '.join(table.columns) or 'none'}"
    if name == "columns" or (name == "auto" and (prompt_column or answer_column)):
        for option, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
            if not column:
                raise DataError(f"{table.where}: {key}.{option} is missing; {have}; set it to one of them")
            known = column if option == "prompt_column" else column.split(".")[0]
            if known not in table.columns:
                raise DataError(f"{table.where}: {key}.{option} = {column!r}: no such column; {have}")
        return Layout("columns", prompt_column, answer_column, plain_answer)
    candidates: Sequence[Layout] = AUTOMATIC if name == "auto" else OF_NAME[name]
    for layout in candidates:
        if set(layout.columns) <= set(table.columns) and (layout != GSM8K or name != "auto" or _has_hashes(table)):
            return layout
    what = "no known layout" if name == "auto" else f"not in {key}.layout = {name!r}"
    raise DataError(f"{table.where}: {what}; {have}; set {key}.prompt_column and {key}.answer_column")


def _has_hashes(table: Table) -> bool:
    return any(after_hashes(row["answer"]) for row in islice(table.rows(["answer"]), 1))
