"""Finding a recipe: a YAML file, a preset of the package, or a recipe's bare name with its defaults."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from scionlm.core.config import Mapping, apply_overrides, check_keys, load_yaml, nearest, parse_yaml, validate
from scionlm.core.errors import UsageError
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_data import EMPTY_DIR
from scionlm.recipes.config_inherit import HALF, SIZES, says_how_many, settle_inherit
from scionlm.recipes.config_shear import BUDGETS, DEPTH

SWEEP = "sweep"
"""The recipe of a file that is a sweep of several runs."""

# A bare recipe's defaults: what is left out (source, data.dir, a budget) the user must give.
RECIPES: dict[str, Mapping] = {
    "inheritune": {"recipe": "inheritune", "data": {}, "inherit": {}, "train": {}},
    "shear": {"recipe": "shear", "data": {}, "target": {}, "prune": {}, "train": {}},
    "continual": {"recipe": "continual", "data": {}, "train": {}},
    "scratch": {"recipe": "scratch", "data": {}, "train": {}},
}
_REQUIRED = {
    "inheritune": ("source", "data.dir", "train.tokens"),
    "shear": ("source", "data.dir", "target", "prune.tokens", "train.tokens"),
    "continual": ("source", "data.dir", "train.tokens"),
    "scratch": ("model", "data.dir", "train.tokens"),
}
_EXAMPLES = {
    "source": "source=smollm2-135m",
    "model": "model=tinyllama-120m",
    "data.dir": "data.dir=data",
    "target": "target.parameters=60M",
    "prune.tokens": "prune.tokens=5M",
    "train.tokens": "train.tokens=20M",
}
_ALTERNATIVES = {
    "source": {"reference", "branch", "branch.run"},
    "prune.tokens": {"prune.steps", "prune.method", "prune"},
    "train.tokens": {"train.steps", "train.time", "stages"},
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


def preset_corpora(name: str) -> str:
    """Return the CORPORA.yaml that ships with a preset, with the tokenizer of the preset's source.

    Raises:
        UsageError: There is no such preset, or its data needs none.
    """
    marked = [line for line in preset_text(name).splitlines() if line.startswith("# Corpora: ")]
    if not marked:
        raise UsageError(f"preset {name} comes with no CORPORA.yaml: its head comment says where its data comes from")
    file = resources.files("scionlm.recipes") / "presets" / "corpora" / f"{marked[0].removeprefix('# Corpora: ')}.yaml"
    source = parse_yaml(preset_text(name), name).get("source")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(f"tokenizer: {source}\n" if source and line.startswith("tokenizer: ") else line for line in lines)


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
        sections = {key.split(".")[0] for key in given}
        given |= sections & {"model", "reference", "target"}  # by parts: reference.model.hidden_size=...
        config = override_recipe(RECIPES[name], overrides)
        check_keys(Recipe, config, f"recipe {name}")  # a key that is lacking may only be misspelt
        lacking = [key for key in _REQUIRED[name] if not ({key} | _ALTERNATIVES.get(key, set())) & given]
        if lacking:
            example = " ".join(_EXAMPLES[key] for key in lacking)
            raise UsageError(f"recipe {name} needs {', '.join(lacking)}; for example: {example}")
        settled = RECIPES[name]
        if name == "inheritune" and not says_how_many(config.get("inherit") or {}):
            settled = settled | {"inherit": {"layers": HALF}}
        return settled, f"recipe {name}"
    raise UsageError(_not_found(name, path))


def _not_found(name: str, path: Path) -> str:
    """Return what a name that stands for no recipe may have been meant to be."""
    if path.is_dir():
        if (path / "config.yaml").is_file():
            return f"{name} is a folder; did you mean {path / 'config.yaml'}?"
        if (path / "config.json").is_file():
            return f"{name} is a model; use source={name} with a recipe, for example: inheritune source={name} ..."
        return f"{name} is a folder, not a recipe: name a YAML file, a preset (see: scion presets) or a recipe"
    if "/" in name or path.suffix in (".yaml", ".yml"):
        return f"{name}: no such file; name a YAML file, a preset (see: scion presets) or a recipe"
    if name == SWEEP:
        return f"a {SWEEP} needs a YAML file with recipe: {SWEEP} and its runs; name that, or a preset that is one"
    near = nearest(name, [*preset_names(), *RECIPES]) or f"; recipes are {', '.join(RECIPES)}"
    return f"recipe {name!r} is no file, preset or recipe{near} (see: scion presets)"


def override_recipe(config: Mapping, overrides: Sequence[str] | dict[str, Any]) -> Mapping:
    """Apply overrides; setting one of two keys that exclude each other clears the other.

    Raises:
        UsageError: One of them has no `=`, runs through a value, or names an empty `data.dir`: a shell variable that is
            not set must not stand for the demo's text.
    """
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
        if any(text.replace(" ", "") == "data.dir=" for text in overrides):
            raise UsageError(f"data.dir {EMPTY_DIR}")
    budget = ("steps", "tokens", "time")
    train, given = config.get("train"), [name for name in budget if f"train.{name}" in keys]
    if isinstance(train, dict) and len(given) == 1:
        train |= {name: None for name in budget if name != given[0]}
    prune, given = config.get("prune"), [name for name in ("steps", "tokens") if f"prune.{name}" in keys]
    if isinstance(prune, dict) and len(given) == 1:
        prune |= {name: None for name in ("steps", "tokens") if name != given[0]}
    target, ways = config.get("target"), ("shape", *BUDGETS)
    given = [name for name in ways if f"target.{name}" in keys and (target or {}).get(name) is not None]
    if isinstance(target, dict) and len(given) == 1:  # the sizes too: they would be taken instead
        target |= {name: None for name in (*ways, DEPTH, *SIZES) if f"target.{name}" not in keys}
    inherit = config.get("inherit")
    if isinstance(inherit, dict):
        whole = max((number for number, key in enumerate(keys) if key == "inherit"), default=-1)
        settle_inherit(inherit, [key[len("inherit.") :] for key in keys[whole + 1 :] if key.startswith("inherit.")])
    return config
