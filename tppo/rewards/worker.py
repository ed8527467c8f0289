"""A process that checks answers: a JSON line in, a JSON line out. Started by tppo.rewards.pool; never imports torch.

    setup  {"math": bool, "pattern": str | null, "function": str | null, "sys_path": [...], "limit_s": 5.0}
    reply  {"ready": true}, or {"error": "..."}
    job    {"kind": "math", "gold": "1/2", "text": "\\boxed{0.5}"}
    reply  {"correct": true, "unparsed": false}
    job    {"kind": "gold", "text": "1/2"}
    reply  {"readable": true}
    job    {"kind": "answer", "text": "... the answer is 0.5"}
    reply  {"answer": "0.5"}, or null where there is none
    job    {"kind": "alike", "answers": ["1/2", "3", "0.5"]}
    reply  {"first": [0, 1, 0]}: places of the first that each equals
    job    {"kind": "format", "text": "..."}
    reply  {"match": true}
    job    {"kind": "function", "prompt": "...", "response": "...", "answer": "...", "columns": "{\"level\": 5}"}
    reply  {"reward": 1.0}; to any job also {"error": "..."}

It ends when its input does. While a job runs its parent may be killed: a thread watches for that, and where the job
never lets a thread run (a regular expression that backtracks), a limit on CPU time ends the process.
"""

import contextlib
import importlib
import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 * 2**30
"""Of a process that checks mathematics: 10^(10^10) is easily written and must not take the machine with it."""
PARENT_CHECK_S = 0.5
GRACE_S = 2.0
"""The parent kills first; the limit on CPU time is for when there is none."""

Job = dict[str, Any]


def main() -> None:
    jobs, replies = _own_pipes()
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def reply(value: Job) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    setup = json.loads(jobs.readline() or "null")
    if setup is None:
        return
    try:
        checks = _prepare(setup)
    except (Exception, SystemExit) as error:
        reply({"error": f"{type(error).__name__}: {_line(error)}"})
        return
    limit_s = (setup["limit_s"] + GRACE_S) * (os.cpu_count() or 1 if setup["function"] else 1)  # may use threads
    reply({"ready": True})
    for line in jobs:
        job = json.loads(line)
        _limit_cpu(limit_s)
        try:
            answer = checks[job["kind"]](job)
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {_line(error)}"}
        _limit_cpu(0)
        reply(answer)


def _own_pipes() -> tuple[Any, Any]:
    """Input and output of the protocol. What checks print goes to standard error instead."""
    jobs, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return jobs, replies


def _prepare(setup: Job) -> dict[str, Callable[[Job], Job]]:
    """Import what jobs need, outside their time limit."""
    checks: dict[str, Callable[[Job], Job]] = {}
    sys.path[:] = list(dict.fromkeys([*sys.path, *setup["sys_path"]]))
    if setup["function"]:
        function = _function_of(setup["function"])
        takes = _keywords_of(function)
        checks["function"] = lambda job: _call(function, takes, job)
    else:
        _limit_memory()
    if setup["pattern"]:
        pattern = re.compile(setup["pattern"], re.DOTALL)
        checks["format"] = lambda job: {"match": pattern.search(job["text"]) is not None}
    if setup["math"]:
        import math_verify

        logging.disable()  # it says for every answer that its own time limit is off
        math_verify.verify(math_verify.parse("$1$", parsing_timeout=None), [2], timeout_seconds=None)
        checks |= {"math": _check_math, "gold": _read_gold, "answer": _read_answer, "alike": _compare}
    return checks


def _function_of(name: str) -> Callable[..., Any]:
    """package.module:Class.method, or with dots alone: what is left of the last module is looked up inside of it."""
    module, colon, path = name.partition(":")
    function: Any = None
    if colon:
        function = importlib.import_module(module)
    while function is None:
        module, _, attribute = module.rpartition(".")
        path = f"{attribute}.{path}".rstrip(".")
        try:
            function = importlib.import_module(module)
        except ModuleNotFoundError as error:
            absent = error.name or ""
            if "." not in absent or not f"{module}.".startswith(f"{absent}."):  # or is what a module imports
                raise
    for attribute in path.split("."):
        function = getattr(function, attribute)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


def _keywords_of(function: Callable[..., Any]) -> Callable[[str], bool]:
    """Whether a column of this name is an argument, besides prompt, response and answer, which go by position."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of something built in
        return lambda name: False
    by_position = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    taken, any_name = by_position[:3], any(each.kind == each.VAR_KEYWORD for each in parameters)
    by_name = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return lambda name: name not in taken and (any_name or name in by_name)


def _call(function: Callable[..., Any], takes: Callable[[str], bool], job: Job) -> Job:
    columns = {name: value for name, value in json.loads(job["columns"]).items() if takes(name)}
    result = function(job["prompt"], job["response"], job["answer"], **columns)
    if isinstance(result, str) or not hasattr(result, "__float__"):
        return {"error": f"returned {result!r:.60}, not a number"}
    number = float(result)
    if number != number or number in (float("inf"), float("-inf")):
        return {"error": f"returned {number}, not a finite number"}
    return {"reward": number}


def _check_math(job: Job) -> Job:
    """Whether two answers are mathematically equal. `text` is a \\boxed answer, or the end of a response."""
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{job['gold']}}}", parsing_timeout=None)
    given = parse(job["text"], parsing_timeout=None)
    if not gold or not given:
        return {"correct": False, "unparsed": True}
    return {"correct": bool(verify(gold, given, timeout_seconds=None)), "unparsed": False}


def _read_gold(job: Job) -> Job:
    """Whether other ways to write it could be told to equal it; words have none."""
    from math_verify import parse

    text = job["text"]
    found = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
    return {"readable": any(not isinstance(each, str) for each in found) or "".join(text.split()).isalpha()}


def _read_answer(job: Job) -> Job:
    """What `text` answers, a number without the marks around it: **7** is 7."""
    from math_verify import parse

    found = parse(job["text"], parsing_timeout=None)
    if not found:
        return {"answer": None}
    return {"answer": str(found[0] if getattr(found[0], "is_Integer", False) else found[-1])}


def _compare(job: Job) -> Job:
    """Which of a problem's answers are equal, each compared with the first of every kind that came before it."""
    from math_verify import parse, verify

    parsed = [parse(f"\\boxed{{{answer}}}", parsing_timeout=None) for answer in job["answers"]]
    first: list[int] = []
    for place, own in enumerate(parsed):
        kinds = [earlier for earlier in range(place) if first[earlier] == earlier]
        equal = (
            earlier
            for earlier in kinds
            if verify(parsed[earlier], own, allow_set_relation_comp=True, timeout_seconds=None)
        )
        first.append(next(equal, place))
    return {"first": first}


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _limit_cpu(seconds: float) -> None:
    """End the process by a signal that needs no Python to run; 0: no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere, and a lower limit may stand
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


if __name__ == "__main__":
    main()
