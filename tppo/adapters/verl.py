"""verl: `tppo profile --adapter verl -- python -m verl.trainer.main_ppo ...`, or `tppo.adapters.verl.install()` before
its trainer starts. Every timer of a step becomes a phase under our name for it.

verl times a step with `marked_timer(name, timing_raw)`, imported by name into its trainers: the function is replaced
in every module that has it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from profiling.markers import phase

PHASES = {
    "gen": "rollout", "generate_sequences": "rollout", "reward": "reward", "old_log_prob": "logprob_forward",
    "ref": "reference_forward", "values": "value_forward", "update_critic": "update_value",
    "update_actor": "update_policy", "update_weights": "weight_sync", "testing": "evaluation",
    "save_checkpoint": "checkpoint",
}  # fmt: skip
"""verl's timers -> profiling.schema.PHASES; others keep their names, `step` (around all of them) is left out."""
MODULES = ("verl",)
FUNCTION = "marked_timer"


def install() -> int:
    """Replace the timer in every loaded module of verl's. Returns in how many; 0: import verl's trainer first."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "verl" and module is not None]
    return sum(patch(module) for module in modules)


def patch(module: ModuleType) -> int:
    """The same in one module: 1 where it has the timer."""
    original = getattr(module, FUNCTION, None)
    if not callable(original) or hasattr(original, "_tppo"):
        return 0
    setattr(module, FUNCTION, with_phases(original))
    return 1


_steps = {"now": 0}
"""Of this process, whichever module's timer counted it."""


def with_phases(timer: Callable[..., Any]) -> Callable[..., Any]:
    """`timer`, which also marks phases. Steps are counted by its `step` timers."""

    @contextmanager
    def marked_timer(name: str, *others: Any, **more: Any) -> Iterator[Any]:
        if name == "step":
            _steps["now"] += 1
            with timer(name, *others, **more) as value:
                yield value
            return
        with phase(PHASES.get(name, name), _steps["now"]), timer(name, *others, **more) as value:
            yield value

    marked_timer._tppo = True  # type: ignore[attr-defined]
    return marked_timer
