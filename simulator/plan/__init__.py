"""Before buying: hours, money, energy and idle time of ways to run one training, each with an interval."""

from simulator.plan.answer import Answer, answer
from simulator.plan.question import Question

__all__ = ["Answer", "Question", "answer"]
