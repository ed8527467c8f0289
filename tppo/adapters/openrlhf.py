"""OpenRLHF: `tppo profile --adapter openrlhf -- python -m openrlhf.cli.train_ppo_ray ...`, or `install()` before its
trainer is made. Names as of August 2026.

Its experience making is one phase: forwards of actor, reference, critic and reward model run side by side. So is its
PPO update: actor and critic train at the same time.
"""

import sys
from types import ModuleType

from tppo.adapters.methods import Steps, with_phases

MODULES = ("openrlhf",)
CLASSES = {
    "openrlhf.trainer.ppo_utils.samples_generator": ("SamplesGenerator", {"generate_samples": "rollout"}),
    "openrlhf.trainer.ppo_utils.experience_maker": (
        "RemoteExperienceMaker",
        {"make_experience_batch": "logprob_forward"},
    ),
    "openrlhf.trainer.ppo_trainer": (
        "BasePPOTrainer",
        {
            "ppo_train": "update_policy",
            "broadcast_to_vllm": "weight_sync",
            "evaluate": "evaluation",
            "save_logs_and_checkpoints": "checkpoint",
        },
    ),
}
"""Module -> class, and its methods' phases (profiling.schema.PHASES)."""
_steps = Steps(first="generate_samples")


def patch(module: ModuleType) -> int:
    """Mark phases in one of its modules; how many methods."""
    if module.__name__ not in CLASSES:
        return 0
    name, phases = CLASSES[module.__name__]
    owner = getattr(module, name, None)
    return 0 if owner is None else with_phases(owner, phases, _steps)


def install() -> int:
    """Mark phases in every loaded module of its. Returns how many methods; 0: import its trainer first."""
    return sum(patch(sys.modules[name]) for name in CLASSES if name in sys.modules)
