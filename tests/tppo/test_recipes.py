"""The recipes against the published settings, written down here from the papers' tables."""

from dataclasses import MISSING, FrozenInstanceError, asdict, fields

import pytest

from tppo.algorithms.geppo import clip_width, reuse_weights
from tppo.algorithms.recipes import RECIPES, Recipe

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


def test_names_are_their_keys_and_recipes_cannot_change():
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    with pytest.raises(FrozenInstanceError):
        RECIPES["ppo"].gamma = 0.9


REST = (
    "policy_tokens", "clamp_advantages", "proximal", "importance_cap", "gamma", "lm_loss_coef", "dynamic_sampling",
    "overlong_share",
)  # fmt: skip
REST_OF_TABLE = {
    "ppo": ("window", 0.0, "behaviour", 0.0, 1.0, 0.0, False, 0.0),
    "ppo-ewma": ("window", 0.0, "ewma", 0.0, 1.0, 0.0, False, 0.0),
    "geppo": ("window", 0.0, "step_start", 0.0, 1.0, 0.0, False, 0.0),
    "vapo": ("window", 0.0, "behaviour", 0.0, 1.0, 0.1, False, 0.0),
    "dapo": ("window", 0.0, "behaviour", 0.0, 1.0, 0.0, True, 4096 / 20_480),  # the paper's cache and maximum
    "tppo": ("window", 10.0, "behaviour", 0.0, 1.0, 0.0, False, 0.0),
}


@pytest.mark.parametrize("name", REST_OF_TABLE)
def test_what_a_column_leaves_unsaid_is_off_or_ppos(name):
    recipe = RECIPES[name]
    assert tuple(getattr(recipe, column) for column in REST) == REST_OF_TABLE[name]
    assert {"name", *COLUMNS, *REST} == asdict(recipe).keys()  # no choice that no table names
    assert recipe.truncated == (name == "tppo")
    assert recipe.has_value_model == (name != "dapo")


def test_partial_rollout_is_tppos_recipe_with_whole_responses_and_importance_weights():
    changed = {
        field: value for field, value in asdict(RECIPES["partial-rollout"]).items()
        if value != getattr(RECIPES["tppo"], field)
    }  # fmt: skip
    assert changed == {
        "name": "partial-rollout", "policy_tokens": "finished_rows", "proximal": "step_start",
        "importance_cap": 2.0,
    }  # fmt: skip


def test_geppo_reuses_four_batches_within_a_tenth():
    # N/2 new rows a step; nu = 0.4, 0.3, 0.2, 0.1, mean age 2, eps 0.2 / 2
    weights = reuse_weights(RECIPES["geppo"].reuse)
    assert weights.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-6)
    assert clip_width(RECIPES["geppo"].clip[0], weights) == pytest.approx(0.1)


def test_dynamic_sampling_is_never_combined_with_truncation():
    assert not any(recipe.dynamic_sampling and recipe.truncated for recipe in RECIPES.values())


def test_recipes_differ_are_frozen_and_have_no_defaults():
    assert len(RECIPES) == len({recipe.name for recipe in RECIPES.values()}) == len(set(RECIPES.values()))
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(Recipe))
    for recipe in RECIPES.values():
        for field in fields(recipe):
            with pytest.raises(FrozenInstanceError):
                setattr(recipe, field.name, None)
