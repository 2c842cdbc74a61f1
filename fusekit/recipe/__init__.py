"""One YAML file from sources to a merged model: its sections, presets, and how it is read."""

from fusekit.recipe.loading import PRESETS, load_recipe
from fusekit.recipe.sections import Recipe

__all__ = ["PRESETS", "Recipe", "load_recipe"]
