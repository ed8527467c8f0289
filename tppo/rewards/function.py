"""A reward that is a Python function of the user's, called in processes of its own with a time limit.

There it can neither hang nor crash the trainer, nor change its random state. Whatever goes wrong in it ends the run
with one line: a wrong reward function must not train a model for a night.
"""

from collections.abc import Sequence

from tppo.data.problem import Problem
from tppo.rewards.pool import WorkerPool
from tppo.rewards.protocol import Grade, RewardError, is_reward


class FunctionReward:
    """name: as the user wrote it, for messages. right_above: responses of a higher reward count as right."""

    def __init__(self, pool: WorkerPool, name: str, right_above: float = 0.0) -> None:
        self.pool, self.name, self.right_above = pool, name, right_above

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        jobs = [
            {
                "kind": "function",
                "prompt": problem.prompt,
                "response": response,
                "answer": problem.answer,
                "columns": problem.columns,
            }
            for problem, response in zip(problems, responses, strict=True)
        ]
        grades = []
        for problem, result in zip(problems, self.pool.run(jobs) if jobs else [], strict=True):
            fault = result.get("error")
            if result.get("timed_out"):
                fault = f"ended its process or took longer than reward.timeout_s = {self.pool.timeout_s:g}"
            if fault is None and not is_reward(result["reward"]):
                fault = f"returned {result['reward']:g}, which training cannot compute with"
            if fault is not None:
                raise RewardError(
                    f"reward.function = {self.name!r}: {fault}, on the problem {problem.prompt!r:.80} with the answer "
                    f"{problem.answer!r:.60}; mend it"
                )
            grades.append(Grade(result["reward"], result["reward"] > self.right_above))
        return grades

    def close(self) -> None:
        self.pool.close()
