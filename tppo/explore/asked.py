"""A query string as a question, and faults told beside the fields that they are about.

A query has the names and values of `tppo plan`'s flags. Of files it takes bundled names and ids of uploads only: no
path that comes over the network is opened.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from profiling.errors import ConfigError, ToolkitError
from profiling.settings import describe
from simulator.hardware import gpu_names
from simulator.models import bundled_names
from simulator.plan import Question
from tppo.commands.plan import LISTS
from tppo.explore.uploads import PREFIX, Uploads

MOST_CHARACTERS = 2000
"""Of a value."""
REFUSED = {"efficiency": "files are not opened from here; use tppo plan --efficiency FILE"}
STARTS = {"model ": "model", "GPU ": "gpu", "far outside": "extrapolate"}
"""How faults begin that name no field -> the field to show them beside."""


@dataclass(frozen=True)
class Fault:
    field: str | None
    """None: about no field in particular."""
    message: str


class Unclear(ConfigError):
    """A question with faults, all of them."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = faults


def question_from(query: Mapping[str, str], uploads: Uploads) -> Question:
    """Raises Unclear."""
    faults, given = [], {}
    for name, text in query.items():
        try:
            given[name] = _value(name, text, uploads)
        except ConfigError as error:
            faults.append(Fault(name, str(error)))
    if faults:
        raise Unclear(faults)
    try:
        return Question.model_validate(given)
    except ValidationError as error:
        told: dict[str | None, Fault] = {}  # a list without the values that are none of its kind is also too short
        for own in error.errors():
            fault = fault_of(describe(own, Question), own["loc"])
            told.setdefault(fault.field, fault)
        raise Unclear(list(told.values())) from None


def _value(name: str, text: str, uploads: Uploads) -> Any:
    if name not in Question.model_fields:
        near = get_close_matches(name, Question.model_fields, n=1)
        raise ConfigError(f"unknown field '{name[:40]}'{f'; did you mean {near[0]!r}?' if near else ''}")
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{name}: has {len(text)} characters; at most {MOST_CHARACTERS} are read")
    if name in REFUSED:
        raise ConfigError(f"{name}: {REFUSED[name]}")
    if name in ("model", "lengths") and text.startswith(PREFIX):
        found = uploads.get(text, "model" if name == "model" else "lengths")
        if found is None:
            raise ConfigError(f"{name}: this upload is no longer here; upload the file again")
        return str(found.path)
    if name == "lengths":
        raise ConfigError("lengths: paths are not opened from here; upload the file, or paste the numbers")
    if name in ("model", "gpu"):
        known = bundled_names() if name == "model" else gpu_names()
        if text not in known:
            near = get_close_matches(text, known, n=1, cutoff=0.4)
            remedy = "; upload its config.json" if name == "model" else "; use tppo plan for a GPU of your own"
            raise ConfigError(f"{name} {text[:40]!r}: not a bundled one"
                              f"{f'; did you mean {near[0]!r}?' if near else remedy}")  # fmt: skip
    if name in LISTS:
        parts = tuple(part.strip() for part in text.split(","))
        if "" in parts:
            raise ConfigError(f"{name}: an empty value between commas")
        return parts
    return text


FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")


def fault_of(message: str, place: tuple[int | str, ...] = ()) -> Fault:
    """The command's own message, its flags as fields, beside the first field that it names as one."""
    flags = [flag.replace("-", "_") for flag in FLAG.findall(message)]
    text = FLAG.sub(lambda flag: flag[1].replace("-", "_"), message).removeprefix("the file: ")
    text = re.sub(r"(\w+)\.\d+ = ", r"\1 = ", text)
    if place:
        return Fault(str(place[0]), text)
    for start, field in STARTS.items():
        if text.startswith(start):
            return Fault(field, text)
    if flags and flags[0] in Question.model_fields:
        return Fault(flags[0], text)
    named = []
    for name in Question.model_fields:  # "engine" is also a word; "mean_tokens" is not
        follows = "" if "_" in name else "(?= = |:)"
        if found := re.search(rf"\b{name}\b{follows}", text):
            named.append((found.start(), name))
    return Fault(min(named)[1] if named else None, text)


def faults_of(error: ToolkitError, uploads: Uploads) -> list[Fault]:
    if isinstance(error, Unclear):
        found = error.faults
    else:
        text = str(error).removeprefix("experiment: ")
        own = fault_of(text)
        if any(str(upload) in text for upload in uploads.paths("lengths")):
            own = Fault("lengths_column" if "column" in text else "lengths", text)
        found = [own]
    return [Fault(fault.field, uploads.with_names(fault.message)) for fault in found]
