"""What the training phases of a simulated step compute, counted as the trainer counts it, where costs come from a data
sheet: the settings of such costs say how a batch is cut into passes."""

import math
from typing import Any

from profiling.model_flops import VALUE_PHASES
from simulator.cluster import TrainingRun
from simulator.cost_settings import AnalyticCostSettings
from simulator.costs import PHASE_COSTS


def work_record(run: TrainingRun, phase: str, step: int) -> dict[str, Any] | None:
    """A trace record of the phase's passes over whole rows; None for other phases, and for costs of another kind."""
    settings = run.experiment.cost
    if phase not in PHASE_COSTS or not isinstance(settings, AnalyticCostSettings):
        return None
    _, of_finished, processed = run.batch_of(step)
    tokens, pairs = of_finished if phase == "update_value" else processed
    updates = settings.mini_batches if phase.startswith("update_") else 0
    batches, replicas = max(updates, 1), settings.replicas(run.experiment.cluster.training_gpus)
    passes = batches * replicas * max(1, math.ceil(tokens / batches / replicas / settings.micro_batch_tokens))
    forward = {
        "passes": passes, "tokens": int(tokens), "pairs": int(pairs),
        "outputs": 0 if phase in VALUE_PHASES else int(tokens),
    }  # fmt: skip
    backward = {f"backward_{name}": count if updates else 0 for name, count in forward.items()}
    return {"type": "work", "name": phase, "step": step, **forward, **backward, "updates": updates}
