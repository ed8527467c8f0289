"""The recipes against the published settings, written down here from the papers' tables."""

from dataclasses import FrozenInstanceError

import pytest

from tppo.algorithms.recipes import RECIPES

COLUMNS = ("rollout", "advantage", "lam", "value_target", "aggregation", "normalise", "objective", "clip", "reuse")
TABLE = {
    "ppo": ("to_end", "egae", 0.95, "gae_return", "sequence-mean", "whiten", "clip", (0.2, 0.2), 1),
    "ppo-ewma": ("to_end", "egae", 0.95, "gae_return", "sequence-mean", "whiten", "decoupled_clip", (0.2, 0.2), 1),
    "geppo": ("to_end", "vtrace_gae", 0.95, "vtrace_return", "token-mean", "reuse", "additive_clip", (0.2, 0.2), 2),
    "vapo": ("to_end", "egae", "length_adaptive", "monte_carlo", "token-mean", "whiten", "clip", (0.2, 0.28), 1),
    "dapo": ("to_end", "group_relative", 1.0, None, "token-mean", None, "clip", (0.2, 0.28), 1),
    "tppo": ("window", "egae", 0.95, "monte_carlo", "token-mean", "whiten", "clip", (0.2, 0.28), 1),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_reads_like_its_column(name):
    recipe = RECIPES[name]
    assert tuple(getattr(recipe, column) for column in COLUMNS) == TABLE[name]
    assert recipe.gamma == 1.0


def test_what_only_one_recipe_has():
    def having(condition):
        return [name for name in TABLE if condition(RECIPES[name])]

    assert having(lambda r: r.lm_loss_coef == 0.1) == having(lambda r: r.lm_loss_coef) == ["vapo"]
    assert having(lambda r: r.dynamic_sampling) == having(lambda r: r.overlong_share) == ["dapo"]
    assert having(lambda r: r.clamp_advantages == 10.0) == having(lambda r: r.clamp_advantages) == ["tppo"]
    assert having(lambda r: r.proximal == "ewma") == ["ppo-ewma"]
    assert having(lambda r: not r.has_value_model) == ["dapo"]
    assert RECIPES["ppo-ewma"].max_importance == 100.0


def test_names_are_their_keys_and_recipes_cannot_change():
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    with pytest.raises(FrozenInstanceError):
        RECIPES["ppo"].gamma = 0.9
