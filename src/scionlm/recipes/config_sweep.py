"""Sweeps: a recipe file with several runs; what a run leaves unset comes from the file's top level."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from scionlm.core.config import Mapping, Section, nearest, section_at, validate
from scionlm.core.errors import UsageError
from scionlm.recipes.config import RUN_PREFIX, Recipe
from scionlm.recipes.config_grow import ReferenceConfig
from scionlm.recipes.grid import expand
from scionlm.recipes.model_shapes import init_of
from scionlm.recipes.origin import REFERENCE
from scionlm.recipes.presets import SWEEP, find_recipe, load_recipe, override_recipe
from scionlm.recipes.reference import OF_REFERENCE, OWN_OF_REFERENCE
from scionlm.recipes.stages import left_of

Overrides = Sequence[str] | dict[str, Any]

# Where a run may name an earlier one: as its source, to branch off, and to replay.
_NAMING = ("source", "branch.run", "replay.run")
# What a run that names its recipe does not take over: it is about other recipes.
_OF_OTHERS = {
    "inheritune": ("target", "prune"),
    "shear": ("inherit", "grow"),
    "continual": ("inherit", "grow", "target", "prune"),
}
_OF_SCRATCH = (*OF_REFERENCE, "upstream")


class RunName(Section):
    """What every run of a sweep needs; the rest of it is keys of a recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$")
    """Its name and that of its folder."""


class SweepConfig(Section):
    """The keys of a sweep beside those that its runs share."""

    recipe: Literal["sweep"]
    """Says that the file is a sweep."""
    kind: Literal["inheritune", "shear", "continual", "scratch"] = "inheritune"
    """The recipe of runs that name none."""
    runs: list[Mapping] = Field(default=[])
    """The runs: a name each, and any keys of a recipe."""
    grid: Mapping | None = None
    """More runs, one for every combination of values: keys as in a recipe, a list of values each."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] | None = Field(default=None, min_length=1)
    """Make each run once with each of these seeds; null takes `seed`."""
    only: list[str] | None = Field(default=None, min_length=1)
    """Names of the runs to make; null makes all."""
    reference: ReferenceConfig | None = None
    """A model that is trained from scratch first, as run `reference`, and is the source of the runs that name none."""

    @field_validator("seeds", "only")
    @classmethod
    def _each_once(cls, values: list[Any] | None) -> list[Any] | None:
        if values and len(set(values)) < len(values):
            raise ValueError("one of them stands twice")
        return values

    @model_validator(mode="after")
    def _some(self) -> "SweepConfig":
        if not self.runs and not self.grid:
            raise ValueError("set runs (a list) or grid (keys with a list of values each)")
        return self


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: As the sweep calls it; with several seeds it is that of several runs.
        folder: Name of its folder in RUN/runs.
        recipe: With everything filled in. Its source may still be `run:NAME`, and what it branches off or replays.
    """

    name: str
    folder: str
    recipe: Recipe

    @property
    def parents(self) -> dict[str, str]:
        """Names of the earlier runs that it needs, by the key that names them."""
        found: dict[str, str] = {}
        for place in _NAMING:
            section, _, key = place.partition(".")
            value = getattr(self.recipe, section)
            value = getattr(value, key) if key and value is not None else value
            if isinstance(value, str) and value.startswith(RUN_PREFIX):
                found[place] = value.removeprefix(RUN_PREFIX)
        return found

    @property
    def parent(self) -> str | None:
        """Name of the run whose result is its source; None where the source is a MODEL."""
        return self.parents.get("source")


@dataclass(frozen=True)
class Sweep:
    """A sweep that was read and checked.

    Attributes:
        config: The file with overrides applied; `scion run` on it repeats the sweep.
        runs: All runs: those of the first seed in the file's order, then those of the next.
        only: Names of the runs to make.
    """

    config: Mapping
    runs: list[SweepRun]
    only: list[str]

    @property
    def chosen(self) -> list[SweepRun]:
        """The runs to make, in order; the reference among them."""
        return [run for run in self.runs if run.name in (*self.only, REFERENCE)]

    def parent_of(self, run: SweepRun) -> SweepRun | None:
        """Return the run whose result is a run's source."""
        return self.named(run.parent, run)

    def named(self, name: str | None, run: SweepRun) -> SweepRun | None:
        """Return the run that another means by a name: of the same seed; the reference is the same for all seeds."""
        named = [one for one in self.runs if one.name == name]
        same = (one for one in named if one.recipe.seed == run.recipe.seed)
        return next(same, named[0] if len(named) == 1 else None)


def load_request(name: str, overrides: Overrides = ()) -> Recipe | Sweep:
    """Return the recipe or the sweep that `name` stands for, with overrides.

    Args:
        name: Path of a YAML file, a preset, or a recipe's name.
        overrides: `KEY=VALUE` texts, or a mapping of dotted keys to values. In a sweep they act on the top level, and
            `runs.NAME.KEY` on one run.

    Raises:
        UsageError: There is no such recipe, or it, or a run of the sweep, does not validate.
    """
    config, where = find_recipe(name, overrides)
    return read_sweep(config, where, overrides) if config.get("recipe") == SWEEP else load_recipe(name, overrides)


def read_sweep(config: Mapping, where: str, overrides: Overrides = ()) -> Sweep:
    """Return the sweep that a mapping holds, with every run's recipe checked.

    Args:
        config: What stands in the file.
        where: What the file is called in messages.
        overrides: See `load_request`.

    Raises:
        UsageError: It does not validate; the message names the run and the key.
    """
    config = _overridden(config, overrides, where)
    own = validate(SweepConfig, {key: value for key, value in config.items() if key in SweepConfig.model_fields}, where)
    shared = {key: value for key, value in config.items() if key not in SweepConfig.model_fields}
    for key in shared:
        if key not in Recipe.model_fields:
            known = [*SweepConfig.model_fields, *Recipe.model_fields]
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    if own.seeds is not None and shared.get("seed") is not None:
        raise UsageError(f"{where}: set either seed (of all runs) or seeds (each run once with each), the other null")
    listed = own.runs + expand(own.grid or {}) if own.grid else own.runs
    names = _names(listed, where)
    for name in own.only or []:
        if name not in names:
            raise UsageError(f"{where}: only names {name!r}, which is no run of it{nearest(name, names)}")
    runs: list[SweepRun] = []
    inherited = shared
    if own.reference is not None:
        runs.append(_reference_of(own, shared, where))
        names.insert(0, REFERENCE)
        init = shared.get("init") or init_of(own.reference.model)  # of its controls too
        inherited = shared | {"source": RUN_PREFIX + REFERENCE} | ({} if init == "transformers" else {"init": init})
    for seed in own.seeds or [None]:
        for keys in listed:
            name: str = keys["name"]
            folder = name if len(own.seeds or [0]) == 1 else f"{name}-seed{seed}"
            top = shared if keys.get("recipe") == "scratch" else inherited
            run = SweepRun(name, folder, _recipe_of(own, top, keys, seed, f"{where}, run {name!r}"))
            earlier = names[: names.index(name)]
            for place, parent in run.parents.items():
                if parent not in earlier:
                    raise UsageError(
                        f"{where}, run {name!r}: {place} {RUN_PREFIX + parent!r} is no run before it"
                        f"{nearest(parent, earlier)}"
                    )
            runs.append(run)
    return Sweep(config, runs, own.only if own.only is not None else names)


def _reference_of(own: SweepConfig, shared: Mapping, where: str) -> SweepRun:
    """Return the run that trains the reference."""
    if own.reference is None or "source" in shared:
        raise UsageError(f"{where}: set either source or reference (one that is trained first), the other null")
    top = {key: value for key, value in shared.items() if key in OF_REFERENCE}
    changed = {key: getattr(own.reference, key) for key in OWN_OF_REFERENCE}
    config = fill(Recipe, top, {key: value for key, value in changed.items() if value is not None})
    seed = {"seed": own.seeds[0]} if own.seeds else {}
    config |= {"recipe": "scratch", "model": own.reference.model, "export": {"dtype": "float32"}} | seed
    return SweepRun(REFERENCE, REFERENCE, validate(Recipe, config, f"{where}, reference"))


def _names(runs: list[Mapping], where: str) -> list[str]:
    """Return the names of the runs; they are folders, so that no two may differ in case alone."""
    names: list[str] = []
    for number, keys in enumerate(runs):
        given = {"name": keys["name"]} if "name" in keys else {}
        name = validate(RunName, given, f"{where}, runs.{number}").name
        if name.lower() in (other.lower() for other in (*names, REFERENCE)):
            raise UsageError(f"{where}: two runs are called {name!r}; give each a name of its own")
        names.append(name)
    return names


def _recipe_of(sweep: SweepConfig, shared: Mapping, keys: Mapping, seed: int | None, where: str) -> Recipe:
    own = {"recipe": sweep.kind} | {key: value for key, value in keys.items() if key != "name"}
    if seed is not None and own.get("seed") is not None:
        raise UsageError(f"{where}: it has a seed, and the sweep has seeds; leave one of them out")
    seeded = {} if seed is None else {"seed": seed}
    if own["recipe"] == "scratch":
        if sweep.kind != "scratch":  # what is shared is for the others
            shared = {key: value for key, value in shared.items() if key in _OF_SCRATCH}
        if sweep.reference is not None:
            shared = {key: value for key, value in shared.items() if key != "source"} | {"model": sweep.reference.model}
    others = _OF_OTHERS.get(str(keys.get("recipe")), ())
    shared = {key: value for key, value in shared.items() if key not in others}
    return validate(Recipe, fill(Recipe, shared, own) | seeded, where)


def fill(schema: type[Section], base: Mapping, own: Mapping) -> Mapping:
    """Return keys with those of another mapping where they leave a key unset, section by section.

    A key that excludes others clears them; a section given as null is null; mappings that are values, such as a
    mixture, are taken whole.
    """
    filled = dict(base)
    for key, value in own.items():
        inner, before = section_at(schema, key), base.get(key)
        if inner is not None and isinstance(value, dict) and isinstance(before, dict):
            value = cast("Mapping", value)
            filled[key] = fill(inner, left_of(key, cast("Mapping", before), value), value)
        else:
            filled[key] = value
    return filled


def _overridden(config: Mapping, overrides: Overrides, where: str) -> Mapping:
    """Return a sweep with overrides: `runs.NAME.KEY` acts on that run, the others on the top level."""
    by_run, top = _split(overrides)
    changed = override_recipe({key: value for key, value in config.items() if key != "runs"}, top)
    config = changed | ({"runs": config["runs"]} if "runs" in config and "runs" not in changed else {})
    runs: Any = config.get("runs")
    if by_run and not isinstance(runs, list):
        raise UsageError(f"{where}: override runs.{next(iter(by_run))}... names a run, but the sweep lists none")
    if not by_run:
        return config
    listed = cast("list[Any]", runs)
    names = [str(run.get("name")) for run in listed if isinstance(run, dict)]
    for name in by_run:
        if name not in names:
            raise UsageError(f"{where}: override runs.{name}... names no run of it{nearest(name, names)}")
    filled = [
        override_recipe(run, by_run[str(run.get("name"))])
        if isinstance(run, dict) and str(run.get("name")) in by_run
        else run
        for run in listed
    ]
    return config | {"runs": filled}


def _split(overrides: Overrides) -> tuple[dict[str, Overrides], Overrides]:
    """Return the overrides of runs by name, and those of the top level, in the form that they were given in."""
    if isinstance(overrides, dict):
        by_run = {name: dict[str, Any]() for name in _run_names(overrides)}
        for key, value in overrides.items():
            if _is_of_run(key):
                _, name, rest = key.split(".", 2)
                by_run[name][rest] = value
        return dict(by_run), {key: value for key, value in overrides.items() if not _is_of_run(key)}
    texts = {name: list[str]() for name in _run_names(overrides)}
    for text in overrides:
        if _is_of_run(text):
            _, name, rest = text.strip().split(".", 2)
            texts[name].append(rest)
    return dict(texts), [text for text in overrides if not _is_of_run(text)]


def _is_of_run(text: str) -> bool:
    key = text.split("=", 1)[0].strip()
    return key.startswith("runs.") and key.count(".") > 1


def _run_names(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key.strip().split(".", 2)[1] for key in keys if _is_of_run(key)))
