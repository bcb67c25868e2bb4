"""Finding a recipe: a YAML file, a preset of the package, or a recipe's bare name with its defaults."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from scionlm.core.config import Mapping, apply_overrides, load_yaml, nearest, parse_yaml, validate
from scionlm.core.errors import UsageError
from scionlm.recipes.config import Recipe

SWEEP = "sweep"
"""The recipe of a file that is a sweep of several runs."""

# A bare recipe's defaults: what is left out (source, data.dir, a budget) the user must give.
RECIPES: dict[str, Mapping] = {
    "inheritune": {"recipe": "inheritune", "data": {}, "inherit": {}, "train": {}},
}


def preset_names() -> list[str]:
    """Return the names of the presets."""
    folder = resources.files("scionlm.recipes") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """Return a preset as YAML, head comment and all.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in preset_names():
        raise UsageError(f"preset {name!r} is unknown{nearest(name, preset_names())} (see: scion presets)")
    return (resources.files("scionlm.recipes") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def preset_summary(name: str) -> str:
    """Return the first line of a preset's head comment."""
    return preset_text(name).splitlines()[0].lstrip("# ")


def load_recipe(name: str, overrides: Sequence[str] | dict[str, Any] = ()) -> Recipe:
    """Return the recipe that `name` stands for, with overrides; `config_sweep.load_request` takes sweeps too.

    Args:
        name: Path of a YAML file, a preset, or a recipe's name.
        overrides: `KEY=VALUE` texts, or a mapping of dotted keys to values.

    Raises:
        UsageError: There is no such recipe, it does not validate, or it is a sweep of several.
    """
    config, where = find_recipe(name, overrides)
    if config.get("recipe") == SWEEP:
        raise UsageError(f"{where} is a sweep of several runs, and one run is asked for; name another recipe")
    return validate(Recipe, override_recipe(config, overrides), where)


def find_recipe(name: str, overrides: Sequence[str] | dict[str, Any] = ()) -> tuple[Mapping, str]:
    """Return what stands in the recipe that `name` stands for, and what it is called in messages.

    Args:
        name: Path of a YAML file, a preset, or a recipe's name.
        overrides: What will be changed in it; a bare recipe needs some.

    Raises:
        UsageError: There is no such recipe, or it is no mapping.
    """
    path = Path(name)
    if path.is_file():
        return load_yaml(path), name
    if name in preset_names():
        return parse_yaml(preset_text(name), f"preset {name}"), f"preset {name}"
    if name in RECIPES:
        texts = overrides if not isinstance(overrides, dict) else [f"{key}=" for key in overrides]
        given = {text.split("=", 1)[0].strip() for text in texts}
        required = ["source", "data.dir", "train.tokens", "inherit.layers"]
        alternatives = {"train.tokens": {"train.steps", "train.time"}, "inherit.layers": {"inherit.keep"}}
        given |= {"train.tokens"} if "stages" in given else set()
        lacking = [key for key in required if key not in given and not alternatives.get(key, set()) & given]
        if lacking:
            raise UsageError(f"recipe {name} needs {', '.join(lacking)}; for example: {lacking[0]}=...")
        return RECIPES[name], f"recipe {name}"
    known = [*preset_names(), *RECIPES]
    listed = ", ".join(known)
    raise UsageError(f"recipe {name!r} is no file, preset or recipe{nearest(name, known)} (known: {listed})")


def override_recipe(config: Mapping, overrides: Sequence[str] | dict[str, Any]) -> Mapping:
    """Apply overrides; setting one of two keys that exclude each other clears the other."""
    if isinstance(overrides, dict):
        # A preset from Python: values are values already, so only the path is interpreted.
        for key, value in overrides.items():
            config = apply_overrides(config, [f"{key}=null"])
            *sections, last = key.split(".")
            here = config
            for section in sections:
                here = here[section]
            here[last] = value
        keys = list(overrides)
    else:
        config = apply_overrides(config, overrides)
        keys = [text.split("=", 1)[0].strip() for text in overrides]
    for section, names in (("train", ("steps", "tokens", "time")), ("inherit", ("layers", "keep"))):
        inner = config.get(section)
        given = [name for name in names if f"{section}.{name}" in keys]
        if isinstance(inner, dict) and len(given) == 1:
            inner |= {name: None for name in names if name != given[0]}
            if given[0] == "keep":
                inner["strategy"] = None
    return config
