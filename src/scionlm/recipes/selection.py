"""What a recipe inherits, as a plan: cheap where sizes are asked for, measured on its text before it is trained."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.core.log import warn
from scionlm.core.records import Record, read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.data import DataFolder
from scionlm.families import ModelShape
from scionlm.families.shape import context_length, expected_tensors
from scionlm.families.spec import Part
from scionlm.parallel.ranks import Ranks
from scionlm.recipes.analysis_options import AnalyzeOptions
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_inherit import SIZES, InheritConfig
from scionlm.recipes.measured import (
    HALF,
    choose_layers,
    half_of,
    has_greedy,
    is_of,
    read_analysis,
    require_same_model,
)
from scionlm.sources import ModelFolder
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.request import InheritOptions, complete_plan, layer_plan
from scionlm.surgery.width import Scores

ANALYSIS, IMPORTANCE = "analysis", "importance"
"""Folders of a run that hold what was measured of its source."""
_SURGERY = "surgery.json"
_MEASURED = ("magnitude", "activation", "taylor")

# Inheritune 1.1: what neither the paper's text nor its code inherits, and what its code forgets where nothing is tied.
_NOT_IN_TEXT: tuple[Part, ...] = ("final_norm", "position")
_NOT_IN_CODE: tuple[Part, ...] = ("embedding",)


def plan_of(recipe: Recipe, source: ModelFolder) -> SurgeryPlan:
    """Return what a recipe keeps of the source, from configurations alone, after checking what these can tell.

    Where it is measured, and no finished analysis is named, a plan of the same shape stands in for it: the first
    layers, half of them where their number is measured too, and the first heads and channels.

    Raises:
        UsageError: Layers, parts or sizes that are not there, or an analysis of another model.
        DataError: The analysis is broken.
    """
    if recipe.keeps_shape:
        layers = ModelShape.of(source.config).num_hidden_layers
        return plan_depth(layers, layers, name=source.name)
    inherit = recipe.inherits
    record = read_analysis(inherit.analysis, source) if inherit.analysis else None
    return complete_plan(_layers(recipe, source, record), _options(recipe, source), source, None)


def selected(
    recipe: Recipe,
    source: ModelFolder,
    data: DataFolder,
    domains: Sequence[str],
    folder: Path,
    stop: StopRequest,
    ranks: Ranks,
) -> SurgeryPlan:
    """Return what a recipe keeps of the source, on all ranks; what has to be measured is, on the main one.

    Args:
        recipe: The recipe.
        source: Its source.
        data: The text of its first stage: its training part is what is measured on.
        domains: Which of its domains.
        folder: The run folder; what was measured is kept in it, so that a stopped run does not measure it again.
        stop: Asked before and after.
        ranks: The processes of the run; all have to ask.

    Raises:
        UsageError: As `plan_of`, and an analysis of other weights.
        DataError: A domain is too short, or model and data do not fit.
        StoppedError: A signal came; what was measured is kept.
    """
    inherit = recipe.inherits
    if not inherit.is_measured and inherit.importance not in _MEASURED:
        return plan_of(recipe, source)
    stop.check()
    record = ranks.on_main(lambda: _Measure(recipe, source, data, list(domains), folder).plan().to_dict())
    stop.check()
    return SurgeryPlan.from_dict(record)


class _Measure:
    """What is measured for a plan, once, and kept in the run folder."""

    def __init__(self, recipe: Recipe, source: ModelFolder, data: DataFolder, domains: list[str], folder: Path) -> None:
        self._recipe, self._source, self._data, self._domains, self._folder = recipe, source, data, domains, folder
        self._sha256 = source.weights_fingerprint()

    def plan(self) -> SurgeryPlan:
        """Return the plan."""
        inherit = self._recipe.inherits
        layers = _layers(self._recipe, self._source, self._analysis() if inherit.is_measured else None)
        if layers.strategy.endswith(f":{HALF}"):
            warn(
                f"inherit.strategy {inherit.strategy} says nothing here: of {self._source.name}, no layer is lazy or "
                f"the first one is; the first half is kept, {len(layers.layers)} layers"
            )
        scores = self._scores() if inherit.importance in _MEASURED else None
        return complete_plan(layers, _options(self._recipe, self._source), self._source, scores)

    def _analysis(self) -> Record:
        inherit = self._recipe.inherits
        if inherit.analysis:
            record = read_analysis(inherit.analysis, self._source)
            require_same_model(record, inherit.analysis, self._source, self._sha256)
            return record
        total, where = ModelShape.of(self._source.config).num_hidden_layers, self._folder / ANALYSIS
        layers = _number(inherit, total) or half_of(total)
        greedy = inherit.strategy == "greedy"
        if (where / "analysis.json").exists():
            record = read_json(where / "analysis.json")
            if self._is_own(record) and (not greedy or has_greedy(record, layers)):
                return record
        from scionlm.recipes.analyze import analyze_folder

        seq_len, sequences = self._sample()
        options = AnalyzeOptions(
            domains=self._domains,
            layers=layers,
            greedy=total - layers if greedy else 0,
            seed=self._recipe.seed,
            seq_len=seq_len,
            num_sequences=sequences,
        )
        model = self._recipe.source or str(self._source.path)
        return analyze_folder(model, str(self._data.path), where, options).record

    def _is_own(self, record: Record) -> bool:
        """Return whether an analysis in the run folder is of this source and text; else the store says what differs."""
        text = record["data"]["fingerprint"], record["seed"], {each["name"] for each in record["domains"]}
        mine = self._data.fingerprint, self._recipe.seed, set(self._domains)
        return text == mine and is_of(record, self._source, self._sha256)

    def _sample(self) -> tuple[int, int]:
        """Return the usual length and number of sequences, less where text or context are too short for them."""
        usual = AnalyzeOptions()
        seq_len = min(usual.seq_len, context_length(self._source.config) or usual.seq_len)
        shortest = min(self._data.num_tokens(domain, "train") for domain in self._domains) // seq_len
        sequences = min(usual.num_sequences, max(1, shortest * len(self._domains)))
        if sequences < usual.num_sequences:
            warn(f"the layers are chosen by {sequences} sequences of {seq_len} tokens: a domain has no more of them")
        return seq_len, sequences

    def _scores(self) -> Scores:
        rule = self._recipe.inherits.importance
        return importance_scores(
            rule, self._source, self._source.fingerprint(), self._data, self._domains, self._folder
        )


def importance_scores(
    rule: str,
    source: ModelFolder,
    sha256: str,
    data: DataFolder,
    domains: Sequence[str],
    folder: Path,
    *,
    measured: bool = False,
) -> Scores:
    """Return the scores of a model's heads and channels, measured once and kept in the run folder.

    Args:
        rule: `magnitude`, `activation` (with `layers`: block influence) or `taylor`.
        source: The model.
        sha256: Of all that decides what it says.
        data: The text that they are measured on.
        domains: Which of its domains.
        folder: The run folder.
        measured: They are there already: other processes may be reading them too.
    """
    from scionlm.recipes.analysis_store import Store, flatten
    from scionlm.recipes.scores import Scorer

    settings: Record = {"model": sha256, "importance": rule}
    if rule != "magnitude":
        settings |= {"data": data.fingerprint, "domains": list(domains)}
    store = Store(folder / IMPORTANCE, settings)
    scorer = Scorer(source, str(data.path), list(domains))
    with contextlib.nullcontext() if measured else store.held():
        return store.get(rule, lambda: flatten(scorer.get(rule)))


def _layers(recipe: Recipe, source: ModelFolder, record: Record | None) -> SurgeryPlan:
    """Return the plan for the layers alone: by the analysis where it is there, else what stands in for it."""
    inherit, total = recipe.inherits, ModelShape.of(source.config).num_hidden_layers
    layers = _number(inherit, total)
    if not inherit.is_measured:
        return layer_plan(_options(recipe, source), source, None)
    strategy = inherit.strategy
    assert strategy is not None
    if layers is not None and not 1 <= layers <= total:
        raise UsageError(f"layers: {layers} cannot be chosen by {strategy}; {source.name} has {total} layers")
    if record is None:
        return plan_depth(total, layers or half_of(total), name=source.name)
    keep, how = choose_layers(record, strategy, layers, inherit.analysis or "the analysis")
    return replace(plan_depth(total, keep=keep, name=source.name), strategy=how)


def _number(inherit: InheritConfig, total: int) -> int | None:
    return half_of(total) if inherit.layers == HALF else inherit.layers


def _options(recipe: Recipe, source: ModelFolder) -> InheritOptions:
    """Return what a recipe asks for in the words of `scion inherit`."""
    inherit, sizes = recipe.inherits, _sizes(recipe.inherits, source)
    return {
        "layers": _number(inherit, ModelShape.of(source.config).num_hidden_layers),
        "keep": inherit.keep,
        "strategy": inherit.strategy,
        "repeat": inherit.repeat,
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_key_value_heads"],
        "importance": inherit.importance,
        "fresh": ",".join(fresh_parts(recipe, source)) or None,
        "seed": recipe.seed,
    }


def fresh_parts(recipe: Recipe, source: ModelFolder) -> list[str]:
    """Return the parts that a recipe does not inherit: those it names, and those that its fidelity leaves out.

    Source: Sanyal, Sanghavi and Dimakis, arXiv:2404.08634. The text names embeddings and head beside the layers; the
    published code copies layers and head alone.
    Differs: An embedding that `paper-code` leaves fresh is drawn as the family draws it; theirs from N(0, 1).
    """
    config, found = source.config, list(recipe.inherits.fresh)
    if recipe.fidelity in ("paper-text", "paper-code"):
        there = {place.spec.part for place in expected_tensors(config)}
        untied = not ModelShape.of(config).tie_word_embeddings
        left = _NOT_IN_TEXT + (_NOT_IN_CODE if recipe.fidelity == "paper-code" and untied else ())
        found += [part for part in left if part in there]
    return found


def _sizes(inherit: InheritConfig, source: ModelFolder) -> dict[str, int | None]:
    """Return the sizes that are asked for, by their names.

    Raises:
        UsageError: The source's width cannot be halved.
    """
    if inherit.width is None:
        return {name: getattr(inherit, name) for name in SIZES}
    shape = ModelShape.of(source.config)
    # Key/value heads follow the rule for groups: half of them where groups stay whole, else all, with fewer heads each.
    sizes = {name: getattr(shape, name) for name in SIZES if name != "num_key_value_heads"}
    odd = [name for name, size in sizes.items() if size % 2]
    if odd:
        raise UsageError(
            f"inherit.width: half of {source.name}'s {odd[0]} {sizes[odd[0]]} is no whole number; give the sizes "
            f"({', '.join(SIZES)})"
        )
    return {name: sizes[name] // 2 if name in sizes else None for name in SIZES}


def record_plan(plan: SurgeryPlan, folder: Path) -> None:
    """Write down what the model that is trained in a folder is made of.

    Raises:
        UsageError: What was trained there so far is made of something else.
    """
    path, before = folder / _SURGERY, recorded_plan(folder)
    if before is not None and _made_of(before) != _made_of(plan):
        raise UsageError(
            f"{folder} trains layers {', '.join(map(str, before.keep))} ({before.strategy}); what is inherited now is "
            f"something else ({plan.strategy}): the analysis has changed; use another folder"
        )
    if before is None:
        write_json(path, plan.to_dict())


def recorded_plan(folder: Path) -> SurgeryPlan | None:
    """Return what the model that is trained in a folder is made of; None where that was not written down."""
    path = folder / _SURGERY
    return SurgeryPlan.from_dict(read_json(path)) if path.exists() else None


def _made_of(plan: SurgeryPlan) -> tuple[Any, ...]:
    return plan.layers, plan.hidden, plan.fresh, plan.seed
