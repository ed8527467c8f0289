"""OpenRLHF: `tppo profile --adapter openrlhf -- python -m openrlhf.cli.train_ppo_ray ...`, or `install()` before its
trainer is made. Names as of August 2026.

Its experience making is one phase: forwards of actor, reference, critic and reward model run side by side. So is its
PPO update: actor and critic train at the same time.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from profiling.markers import phase

MODULES = ("openrlhf",)
CLASSES = {
    "openrlhf.trainer.ppo_utils.samples_generator": (
        "SamplesGenerator",
        {"generate_samples": "rollout", "generate_eval_samples": "evaluation"},
    ),
    "openrlhf.trainer.ppo_utils.experience_maker": (
        "RemoteExperienceMaker",
        {"make_experience_batch": "logprob_forward"},
    ),
    "openrlhf.trainer.ppo_trainer": (
        "BasePPOTrainer",
        {
            "ppo_train": "update_policy",
            "broadcast_to_vllm": "weight_sync",
            "save_logs_and_checkpoints": "checkpoint",
        },
    ),
}
"""Module -> class, and its methods' phases (profiling.schema.PHASES)."""
BEFORE_TRAINING = ("generate_samples", "make_experience_batch")
"""Methods of the step that the next `ppo_train` trains; the others belong to the last one."""
_steps = {"trained": 0}


def patch(module: ModuleType) -> int:
    """Mark phases in one of its modules; how many methods. Those that it lacks are left out."""
    name, phases = CLASSES.get(module.__name__, ("", {}))
    owner, found = getattr(module, name, None), 0
    for method, own in phases.items():
        original = getattr(owner, method, None)
        if callable(original) and not hasattr(original, "_tppo"):
            setattr(owner, method, _marked(original, method, own))
            found += 1
    return found


def install() -> int:
    """Mark phases in every loaded module of its. Returns how many methods; 0: import its trainer first."""
    return sum(patch(sys.modules[name]) for name in CLASSES if name in sys.modules)


def _marked(original: Callable[..., Any], method: str, name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def marked(*positional: Any, **named: Any) -> Any:
        _steps["trained"] += method == "ppo_train"
        with phase(name, _steps["trained"] + (method in BEFORE_TRAINING)):
            return original(*positional, **named)

    marked._tppo = True  # type: ignore[attr-defined]
    return marked
