"""verl: `import tppo.adapters.verl; tppo.adapters.verl.install()` before its trainer starts (for example in
`sitecustomize.py`). Every timer of a step becomes a phase under our name for it.

verl times a step with `marked_timer(name, timing_raw)`, imported by name into its trainers: the function is replaced
in every module that has it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from profiling.markers import phase

PHASES = {
    "gen": "rollout", "generate_sequences": "rollout", "reward": "reward", "old_log_prob": "logprob_forward",
    "ref": "reference_forward", "values": "value_forward", "update_critic": "update_value",
    "update_actor": "update_policy", "update_weights": "weight_sync", "testing": "evaluation",
    "save_checkpoint": "checkpoint",
}  # fmt: skip
"""verl's timers -> profiling.schema.PHASES; others keep their names, `step` (around all of them) is left out."""
FUNCTION = "marked_timer"


def install() -> int:
    """Replace the timer in every loaded module of verl's. Returns in how many; 0: import verl's trainer first."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "verl" and module]
    found = 0
    for module in modules:
        original = getattr(module, FUNCTION, None)
        if callable(original) and not hasattr(original, "_tppo"):
            setattr(module, FUNCTION, with_phases(original))
            found += 1
    return found


def with_phases(timer: Callable[..., Any]) -> Callable[..., Any]:
    """`timer`, which also marks phases. Steps are counted by its `step` timers."""
    step = 0

    @contextmanager
    def marked_timer(name: str, *others: Any, **more: Any) -> Iterator[Any]:
        nonlocal step
        if name == "step":
            step += 1
            with timer(name, *others, **more) as value:
                yield value
            return
        with phase(PHASES.get(name, name), step), timer(name, *others, **more) as value:
            yield value

    marked_timer._tppo = True  # type: ignore[attr-defined]
    return marked_timer
