"""Recipes join the floors below: each is a function from a resolved configuration to a finished run folder."""

from scionlm.recipes.config import Recipe
from scionlm.recipes.demo import demo
from scionlm.recipes.presets import load_recipe, preset_names, preset_summary, preset_text
from scionlm.recipes.run import run_recipe

__all__ = ["Recipe", "demo", "load_recipe", "preset_names", "preset_summary", "preset_text", "run_recipe"]
