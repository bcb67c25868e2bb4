"""Strategies that are measured: which layers an analysis of the source speaks for, and how many."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scionlm.analysis.ranking import (
    CRITERIA,
    WAYS,
    best_layers,
    closest_block,
    layers_before_lazy_group,
    potent_prefix,
)
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import Record, read_json
from scionlm.families import ModelShape
from scionlm.recipes.analysis_against import is_analysis
from scionlm.sources import ModelFolder
from scionlm.surgery.depth import STRATEGIES

HALF = "half"
MASKS = "masks"
"""What a plan says of layers and units that learned masks keep."""
DEPTHS: dict[str, str] = {
    "potent_prefix": "the layers before the first lazy one (Inheritune's largest potent prefix)",
    "before_lazy_group": "the layers before the longest lazy group at the end",
}
"""Strategies that say how many layers are kept, too."""
MEASURED: dict[str, str] = {
    **{name: f"the N layers highest in this: {what}" for name, what in CRITERIA.items()},
    **WAYS,
    "lazy": "the N layers lowest in MaxRank: those that Inheritune calls lazy, which its ablation begins with",
    **DEPTHS,
}
"""Name to what it does; what each is measured with is in `analysis`."""


def strategy_reason(strategy: str) -> str:
    """Return what a plan's strategy is, in a few words."""
    rule, _, argument = strategy.partition(":")
    if rule in STRATEGIES:
        return STRATEGIES[rule][1]
    if rule == MASKS:
        return "by masks that were learned while the source was trained"
    if rule not in MEASURED:
        return "as listed"
    if not argument:
        return MEASURED[rule]
    more = "there are none such here, so half of all" if argument == HALF else f"at most {argument}"
    return f"{MEASURED[rule]}; {more}"


def half_of(total: int) -> int:
    """Return half of a source's layers: Inheritune's l0 = L/2, rounded down, and one at least."""
    return max(1, total // 2)


def choose_layers(record: Record, strategy: str, layers: int | None, where: str) -> tuple[list[int], str]:
    """Return the layers that an analysis speaks for, ascending, and how they were chosen.

    Args:
        record: What `analysis.json` holds.
        strategy: A name in `MEASURED`.
        layers: How many; for those in `DEPTHS` the most there may be, where None stands for no limit.
        where: What the analysis is called, for errors.

    Raises:
        UsageError: The analysis lacks what the strategy needs.
        DataError: It is not whole.

    Differs: Inheritune's experiments start at half of the layers whatever the ranks; there is no rule for a model
        without lazy layers, or whose first one is lazy. Here that falls back to half.
    """
    try:
        return _choose(record, strategy, layers, where)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{where} is not a whole analysis ({error}); make it again with scion analyze") from error


def _choose(record: Record, strategy: str, layers: int | None, where: str) -> tuple[list[int], str]:
    total = len(record["layers"])
    if strategy in DEPTHS:
        ranks = np.array([float(layer["max_rank"]) for layer in record["layers"]])
        prefix = strategy == "potent_prefix"
        found = potent_prefix(ranks, record["lazy_tolerance"]) if prefix else layers_before_lazy_group(ranks)
        if layers is not None:
            most = layers if found == 0 else min(found, layers)
            return list(range(most)), f"{strategy}:{layers}"
        if found in (0, total):
            return list(range(half_of(total))), f"{strategy}:{HALF}"
        return list(range(found)), strategy
    assert layers is not None
    if strategy == "angular_block":
        return closest_block(np.array(record["angular"], dtype=np.float64), total - layers), strategy
    if strategy == "greedy":
        if not has_greedy(record, layers):
            raise UsageError(
                f"strategy greedy with {layers} of {total} layers takes out {total - layers}, and {where} did not go "
                f"that far; go on with it: scion analyze ... --greedy {total - layers}"
            )
        gone = set(record["greedy"]["order"][: total - layers]) if layers < total else set()
        return [index for index in range(total) if index not in gone], strategy
    scores: Mapping[str, Any] = {each["name"]: each["scores"] for each in record["criteria"]}
    name, sign = ("max_rank", -1.0) if strategy == "lazy" else (strategy, 1.0)
    return best_layers(sign * np.array(scores[name], dtype=np.float64), layers), strategy


def has_greedy(record: Record, layers: int) -> bool:
    """Return whether greedy removal went down to so many layers in an analysis."""
    total, greedy = len(record["layers"]), record["greedy"]
    return layers == total or (greedy is not None and len(greedy["order"]) >= total - layers)


def read_analysis(folder: str, source: ModelFolder) -> Record:
    """Return a finished analysis after a look at whether it can be of the source; `require_same_model` makes sure.

    Raises:
        UsageError: There is none, or it is of a model of another shape.
        DataError: It is broken.
    """
    if not is_analysis(folder):
        raise UsageError(f"inherit.analysis: {folder} holds no finished analysis; make one with scion analyze")
    record = read_json(Path(folder) / "analysis.json")
    try:
        theirs = {key: record["model"][key] for key in ("model_type", "num_hidden_layers", "hidden_size")}
        name, layers = str(record["model"]["name"]), len(record["layers"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder} is not a whole analysis ({error}); make it again with scion analyze") from error
    shape = ModelShape.of(source.config)
    mine = {"num_hidden_layers": shape.num_hidden_layers, "hidden_size": shape.hidden_size}
    if theirs != mine | {"model_type": source.config["model_type"]} or layers != shape.num_hidden_layers:
        raise _of_another(folder, name, source)
    return record


def require_same_model(record: Record, folder: str, source: ModelFolder, sha256: str) -> None:
    """Refuse an analysis of other weights, or of the same with another configuration where it says which it had.

    Args:
        record: The analysis.
        folder: Where it is.
        source: The model it has to be of.
        sha256: Of its weights.

    Raises:
        UsageError: It is of another.
    """
    if not is_of(record, source, sha256):
        raise _of_another(folder, str(record["model"]["name"]), source)


def is_of(record: Record, source: ModelFolder, sha256: str) -> bool:
    """Return whether an analysis is of a model, whose weights have the hash `sha256`."""
    model, config = record["model"], source.config_fingerprint()
    return model.get("weights_sha256") == sha256 and model.get("config_sha256", config) == config


def _of_another(folder: str, name: str, source: ModelFolder) -> UsageError:
    return UsageError(
        f"inherit.analysis: {folder} is an analysis of another model ({name}), not of {source.name}; analyse the "
        "source (scion analyze), or leave inherit.analysis out"
    )
