"""Recipes: named, complete, frozen configurations. A result's recipe name and seed reproduce it."""

import difflib
from collections.abc import Callable, Mapping

from ibaml.recipes import characters, few_shot, fsmol, heads, sinusoid
from ibaml.recipes.runs import load_learner
from ibaml.recipes.settings import Recipe

__all__ = ["RECIPES", "Recipe", "get_recipe", "load_learner"]

RECIPES: Mapping[str, Callable[[], Recipe]] = {
    **heads.RECIPES,
    **characters.RECIPES,
    **few_shot.RECIPES,
    **sinusoid.RECIPES,
    **fsmol.RECIPES,
}
"""All recipes by name."""


def get_recipe(name: str) -> Recipe:
    """Returns a recipe by name.

    Raises:
        ValueError: If there is none, with the nearest name.

    Examples:
        >>> get_recipe("glyphs_5way_5shot_ibaml").algorithm.name
        'ibaml'
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no recipe {name!r}; did you mean {nearest!r}? `ibaml recipes` lists all.")
    return RECIPES[name]()
