"""An algorithm is a recipe: named choices, one row of a table each. No class hierarchy.

|                  | PPO                 | T-PPO                                   |
| rollout          | to the end          | at most `window` new tokens             |
| advantage        | GAE                 | EGAE, unfinished rows bootstrap         |
| policy tokens    | all                 | this window, less the trailing tokens of truncated rows |
| value target     | GAE return, A + V   | Monte-Carlo return, finished rows only  |
| aggregation      | sequence-mean       | token-mean                              |
| advantages then  | whitened            | whitened, clamped to +-10               |
| clip             | 0.2 / 0.2           | 0.2 / 0.28                              |

Sources: PPO arXiv 1707.06347; T-PPO arXiv 2506.15050, and the authors' port (verl PR 3728) for the clamp and the
trailing filter; 0.28 is DAPO's clip-higher, 2503.14476.
"""

from dataclasses import dataclass
from typing import Literal

from tppo.algorithms.losses import Aggregation


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    truncated: bool
    """Rollouts stop at the window, and unfinished rows continue in the next step."""
    value_target: Literal["gae_return", "monte_carlo"]
    """gae_return: A + V on every token of the step. monte_carlo: the return, on all tokens of finished rows."""
    aggregation: Aggregation
    whiten_advantages: bool
    clamp_advantages: float | None
    clip: tuple[float, float]
    """Trust region [1 - low, 1 + high] of the ratio."""
    gamma: float
    lam: float


PPO = Recipe(
    name="ppo",
    truncated=False,
    value_target="gae_return",
    aggregation="sequence-mean",
    whiten_advantages=True,
    clamp_advantages=None,
    clip=(0.2, 0.2),
    gamma=1.0,
    lam=0.95,
)

T_PPO = Recipe(
    name="tppo",
    truncated=True,
    value_target="monte_carlo",
    aggregation="token-mean",
    whiten_advantages=True,
    clamp_advantages=10.0,
    clip=(0.2, 0.28),
    gamma=1.0,
    lam=0.95,
)

RECIPES = {recipe.name: recipe for recipe in (PPO, T_PPO)}
