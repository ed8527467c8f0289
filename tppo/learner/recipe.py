"""The recipe that a run follows: its algorithm's, changed by its schedule and settings."""

from dataclasses import replace

from tppo.algorithms.recipes import RECIPES, Recipe, across_policies
from tppo.config import RunConfig


def recipe_of(config: RunConfig) -> Recipe:
    algorithm, recipe = config.algorithm, RECIPES[config.algorithm.name]
    if config.rollout.schedule != "recipe":
        recipe = across_policies(recipe)
    if algorithm.old_log_probs is not None:
        own = algorithm.old_log_probs == "rollout"
        recipe = replace(recipe, proximal="behaviour" if own else "step_start")
        if own:
            recipe = replace(recipe, importance_cap=0.0)
    if algorithm.importance_cap is not None:
        recipe = replace(recipe, importance_cap=algorithm.importance_cap)
    return recipe
