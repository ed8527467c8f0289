"""NVTX ranges of a program become phases: `range_push`, `range_pop`, `range`, `range_start` and `range_end` of
torch.cuda.nvtx, and `push_range`, `pop_range`, `start_range`, `end_range` and `annotate` of the package nvtx; those of
an nvtx domain's own methods do not. `tppo profile --adapter nvtx -- COMMAND`, or `install()`.

NVTX knows no steps: a range named `step`, alone or with a number, begins one. Ranges go on to NVTX where there is one.
"""

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from types import ModuleType
from typing import Any

from profiling.markers import VARIABLE, mark

MODULES = ("torch.cuda.nvtx", "nvtx")
_ranges = threading.local()
_steps = {"now": 0}
_handles = itertools.count(1)
_started: dict[int, tuple[str, int, bool, float, Any]] = {}
"""Our handle -> name, step, whether it begins one, its start, NVTX's handle."""


def _begins_a_step(name: str) -> bool:
    found = re.fullmatch(r"(?i)step[ _:#-]*(\d*)", name)
    if found:
        _steps["now"] = int(found[1]) if found[1] else _steps["now"] + 1
    return bool(found)


def push(name: str) -> None:
    stack = _ranges.__dict__.setdefault("stack", [])
    is_step = _begins_a_step(name)
    stack.append((name, time.perf_counter(), is_step))


def pop() -> None:
    """Of the innermost range of this thread; without one, nothing. A step is no phase: those inside it are."""
    stack = _ranges.__dict__.setdefault("stack", [])
    directory = os.environ.get(VARIABLE)
    if not stack:
        return
    name, start, is_step = stack.pop()
    if directory and not is_step:
        depth = 1 + sum(not other[2] for other in stack)
        mark(directory, name, _steps["now"], start, time.perf_counter(), depth)


def start(name: str, theirs: Any) -> int:
    """A range that another thread may end, and that does not nest. theirs: its handle in NVTX. Returns ours."""
    handle = next(_handles)
    is_step = _begins_a_step(name)
    _started[handle] = (name, _steps["now"], is_step, time.perf_counter(), theirs)
    return handle


def end(handle: Any) -> Any:
    """Returns NVTX's own handle."""
    if handle not in _started:  # it began before the functions were replaced
        return handle
    name, step, is_step, began, theirs = _started.pop(handle)
    directory = os.environ.get(VARIABLE)
    if directory and not is_step:
        mark(directory, name, step, began, time.perf_counter())
    return theirs


def patch(module: ModuleType) -> int:
    """Replace the functions of torch.cuda.nvtx or of nvtx; how many."""
    found = 0
    for begin, end in (("range_push", "range_pop"), ("push_range", "pop_range")):
        for name, own in ((begin, lambda *a, **k: push(str(_message(a, k)))), (end, lambda *a, **k: pop())):
            original = getattr(module, name, None)
            if callable(original) and not hasattr(original, "_tppo"):
                setattr(module, name, _both(own, original))
                found += 1
    for first, last in (("range_start", "range_end"), ("start_range", "end_range")):
        for name, around in ((first, _starting), (last, _ending)):
            original = getattr(module, name, None)
            if callable(original) and not hasattr(original, "_tppo"):
                setattr(module, name, around(original))
                found += 1
    annotate = getattr(module, "annotate", None)
    if module.__name__ == "nvtx" and callable(annotate) and not hasattr(annotate, "_tppo"):
        module.annotate = _annotate(annotate)  # type: ignore[attr-defined]
        found += 1
    return found


def install() -> int:
    """Patch what is loaded. Returns how many functions."""
    return sum(patch(sys.modules[name]) for name in MODULES if name in sys.modules)


def _message(positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return positional[0] if positional else named.get("msg", named.get("message", "range"))


def _both(own: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def both(*positional: Any, **named: Any) -> Any:
        own(*positional, **named)
        return _asked(original, *positional, **named)

    both._tppo = True  # type: ignore[attr-defined]
    return both


def _starting(original: Callable[..., Any]) -> Callable[..., Any]:
    def starting(*positional: Any, **named: Any) -> int:
        return start(str(_message(positional, named)), _asked(original, *positional, **named))

    starting._tppo = True  # type: ignore[attr-defined]
    return starting


def _ending(original: Callable[..., Any]) -> Callable[..., Any]:
    def ending(range_id: Any) -> Any:
        return _asked(original, end(range_id))

    ending._tppo = True  # type: ignore[attr-defined]
    return ending


def _asked(original: Callable[..., Any], *positional: Any, **named: Any) -> Any:
    try:
        return original(*positional, **named)
    except (RuntimeError, AttributeError):  # a torch without NVTX
        return -1


def _annotate(original: Any) -> Any:
    class annotate(ContextDecorator):
        _tppo = True

        def __init__(self, message: str | None = None, *positional: Any, **named: Any) -> None:
            self._name = message
            self._inner = original(message, *positional, **named)

        def __call__(self, function: Any) -> Any:
            self._name = self._name or function.__name__
            return super().__call__(function)

        def __enter__(self) -> Any:
            push(str(self._name or "range"))
            return self._inner.__enter__()

        def __exit__(self, *error: Any) -> Any:
            pop()
            return self._inner.__exit__(*error)

    return annotate
