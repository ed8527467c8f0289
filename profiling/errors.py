"""Every error a user can meet.

    ToolkitError
    ├── InputError          exit code 2: what the user gave us is wrong
    │   ├── ConfigError     a configuration file, key or value
    │   └── DataError       a run directory, data set or table that cannot be read
    └── RunError            exit code 1: a run that started and failed
        └── ConservationError   rows, tokens, KV blocks or GPU-seconds do not add up

A message is one line: where, what is wrong, what to do. It quotes what users and files say, so whatever would end the
line or steer a terminal is shown escaped, and the middle of a long one is left out.
"""

from typing import Any

LONGEST_MESSAGE = 2000
"""Characters. The beginning says where, the end what to do."""


class ToolkitError(Exception):
    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    text = _cut(text)
    return text if text.isprintable() else _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def _cut(text: str) -> str:
    if len(text) <= LONGEST_MESSAGE:
        return text
    return f"{text[: LONGEST_MESSAGE * 3 // 4]} [...] {text[-LONGEST_MESSAGE // 4 :]}"


def first_line(error: BaseException) -> str:
    """Of another library's message; the error's type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: Any, longest: int = 80) -> str:
    """A value as Python writes it, cut; its type where that cannot be written."""
    try:
        return repr(value)[:longest]
    except (RecursionError, ValueError):  # nested deeply; a number of thousands of digits
        return f"a {type(value).__name__}"


class InputError(ToolkitError):
    exit_code = 2


class ConfigError(InputError):
    pass


class DataError(InputError):
    pass


class RunError(ToolkitError):
    exit_code = 1


class ConservationError(RunError):
    pass
