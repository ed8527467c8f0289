"""An algorithm is a recipe: named choices, one column of the table each. No class hierarchy.

|              | ppo        | ppo-ewma     | geppo                 | vapo           | dapo           | tppo           |
| rollout      | to the end | to the end   | to the end            | to the end     | to the end     | window         |
| advantage    | GAE .95    | GAE .95      | V-trace GAE .95       | GAE, adaptive  | group          | EGAE .95       |
| value target | A + V      | A + V        | c A + V               | Monte-Carlo    | no value model | Monte-Carlo    |
| aggregation  | sequence   | sequence     | token, nu per batch   | token          | token          | token          |
| normalised   | whiten     | whiten       | by rho_0              | whiten         | the group's    | whiten, +-10   |
| objective    | clip .2    | decoupled .2 | additive, .2 / E[i+1] | clip .2/.28    | clip .2/.28    | clip .2/.28    |
| extra        |            | EWMA policy  | 4 batches, lr adapts  | LM loss .1     | resampling     | trailing filter|

A seventh, `partial-rollout`, is the usual alternative to truncation: windows as in tppo, but only finished responses
train, all their tokens at once, with importance weights for the policies that sampled them (Kimi k1.5, arXiv
2501.12599; the decoupled objective of AReaL, 2505.24298; weights truncated as in IMPALA, 1802.01561).

Sources: PPO arXiv 1707.06347; PPO-EWMA 2110.00641; GePPO 2111.00072; VAPO 2504.05118; DAPO 2503.14476; T-PPO
2506.15050, and the authors' port (verl PR 3728) for the clamp and the trailing filter.
"""

from dataclasses import dataclass, replace
from typing import Literal

from tppo.algorithms.aggregation import Aggregation


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    rollout: Literal["to_end", "window"]
    """window: at most `rollout.window` new tokens a step; unfinished rows continue in the next one."""
    policy_tokens: Literal["window", "finished_rows"]
    """window: tokens generated in this step. finished_rows: all tokens of the rows that finished in it."""
    advantage: Literal["egae", "vtrace_gae", "group_relative"]
    """egae is GAE where every row has finished."""
    lam: float | Literal["length_adaptive"]
    value_target: Literal["gae_return", "vtrace_return", "monte_carlo"] | None
    """gae_return: A + V on every token of the step. vtrace_return: c A + V. monte_carlo: the return, on all tokens of
    rows that finished in this step. None: no value model."""
    normalise: Literal["whiten", "reuse"] | None
    clamp_advantages: float
    """Largest absolute advantage; 0: no bound."""
    aggregation: Aggregation
    objective: Literal["clip", "decoupled_clip", "additive_clip"]
    proximal: Literal["behaviour", "step_start", "ewma"]
    """What the trust region stands around: the sampling policy, the policy at the start of the step, or its EWMA."""
    clip: tuple[float, float]
    """Trust region [1 - low, 1 + high] of the ratio; additive_clip divides the lower one by the mean age."""
    importance_cap: float
    """Bound of the weight pi_step_start / pi_behaviour in `clip` around step_start (truncated importance sampling); 0:
    no weight."""
    gamma: float
    lm_loss_coef: float
    """Weight of the negative log-likelihood of finished responses with a positive reward."""
    reuse: int
    """Rollout batches as large as 1 / reuse of the step's rows; older ones train again, weighted. 1: no reuse."""
    dynamic_sampling: bool
    """Prompts whose answers are all right or all wrong are replaced by new ones."""
    overlong_share: float
    """Share of the maximum length over which the overlong penalty falls to -1."""

    @property
    def truncated(self) -> bool:
        return self.rollout == "window"

    @property
    def has_value_model(self) -> bool:
        return self.value_target is not None


PPO = Recipe(
    name="ppo",
    rollout="to_end",
    policy_tokens="window",
    advantage="egae",
    lam=0.95,
    value_target="gae_return",
    normalise="whiten",
    clamp_advantages=0.0,
    aggregation="sequence-mean",
    objective="clip",
    proximal="behaviour",
    clip=(0.2, 0.2),
    importance_cap=0.0,
    gamma=1.0,
    lm_loss_coef=0.0,
    reuse=1,
    dynamic_sampling=False,
    overlong_share=0.0,
)

PPO_EWMA = Recipe(
    name="ppo-ewma",
    rollout="to_end",
    policy_tokens="window",
    advantage="egae",
    lam=0.95,
    value_target="gae_return",
    normalise="whiten",
    clamp_advantages=0.0,
    aggregation="sequence-mean",
    objective="decoupled_clip",
    proximal="ewma",
    clip=(0.2, 0.2),
    importance_cap=0.0,
    gamma=1.0,
    lm_loss_coef=0.0,
    reuse=1,
    dynamic_sampling=False,
    overlong_share=0.0,
)

GEPPO = Recipe(
    name="geppo",
    rollout="to_end",
    policy_tokens="window",
    advantage="vtrace_gae",
    lam=0.95,
    value_target="vtrace_return",
    normalise="reuse",
    clamp_advantages=0.0,
    aggregation="token-mean",
    objective="additive_clip",
    proximal="step_start",
    clip=(0.2, 0.2),
    importance_cap=0.0,
    gamma=1.0,
    lm_loss_coef=0.0,
    reuse=2,
    dynamic_sampling=False,
    overlong_share=0.0,
)

VAPO = Recipe(
    name="vapo",
    rollout="to_end",
    policy_tokens="window",
    advantage="egae",
    lam="length_adaptive",
    value_target="monte_carlo",
    normalise="whiten",
    clamp_advantages=0.0,
    aggregation="token-mean",
    objective="clip",
    proximal="behaviour",
    clip=(0.2, 0.28),
    importance_cap=0.0,
    gamma=1.0,
    lm_loss_coef=0.1,
    reuse=1,
    dynamic_sampling=False,
    overlong_share=0.0,
)

DAPO = Recipe(
    name="dapo",
    rollout="to_end",
    policy_tokens="window",
    advantage="group_relative",
    lam=1.0,
    value_target=None,
    normalise=None,
    clamp_advantages=0.0,
    aggregation="token-mean",
    objective="clip",
    proximal="behaviour",
    clip=(0.2, 0.28),
    importance_cap=0.0,
    gamma=1.0,
    lm_loss_coef=0.0,
    reuse=1,
    dynamic_sampling=True,
    overlong_share=0.2,
)

T_PPO = Recipe(
    name="tppo",
    rollout="window",
    policy_tokens="window",
    advantage="egae",
    lam=0.95,
    value_target="monte_carlo",
    normalise="whiten",
    clamp_advantages=10.0,
    aggregation="token-mean",
    objective="clip",
    proximal="behaviour",
    clip=(0.2, 0.28),
    importance_cap=0.0,
    gamma=1.0,
    lm_loss_coef=0.0,
    reuse=1,
    dynamic_sampling=False,
    overlong_share=0.0,
)

PARTIAL_ROLLOUT = Recipe(
    name="partial-rollout",
    rollout="window",
    policy_tokens="finished_rows",
    advantage="egae",
    lam=0.95,
    value_target="monte_carlo",
    normalise="whiten",
    clamp_advantages=10.0,
    aggregation="token-mean",
    objective="clip",
    proximal="step_start",
    clip=(0.2, 0.28),
    importance_cap=2.0,
    gamma=1.0,
    lm_loss_coef=0.0,
    reuse=1,
    dynamic_sampling=False,
    overlong_share=0.0,
)

RECIPES = {r.name: r for r in (PPO, PPO_EWMA, GEPPO, VAPO, DAPO, T_PPO, PARTIAL_ROLLOUT)}


def across_policies(recipe: Recipe) -> Recipe:
    """The recipe where a schedule trains rows on another policy than sampled them: whole responses, when they finish,
    around the policy at the start of the step, with truncated importance weights."""
    around = "step_start" if recipe.objective == "clip" else recipe.proximal
    cap = 2.0 if recipe.objective == "clip" else recipe.importance_cap
    return replace(recipe, policy_tokens="finished_rows", proximal=around, importance_cap=cap)
