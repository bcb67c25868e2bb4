"""mergekit's `slices` YAML, for those who have it: layers of one or more models, one slice after another.

Layer ranges are half open there: `[0, 8]` are layers 0 to 7. Only `merge_method: passthrough` without parameters is a
selection of layers; everything else mixes weights and is refused by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scionlm.core.config import load_yaml
from scionlm.core.errors import UsageError
from scionlm.surgery.plan import LayerPlan, SurgeryPlan

_KEYS = ("slices", "merge_method", "dtype", "base_model")


@dataclass(frozen=True)
class Slices:
    """What a file asks for: models by name, and (model, first layer, one behind the last) of each slice."""

    models: tuple[str, ...]
    ranges: tuple[tuple[int, int, int], ...]


def read_slices(path: Path) -> Slices:
    """Return what a mergekit configuration asks for.

    Raises:
        UsageError: It is not a passthrough of slices, or has a key that Scion does not carry out.
    """
    config = load_yaml(path)
    unknown = [key for key in config if key not in _KEYS]
    if unknown:
        raise UsageError(
            f"{path}: {unknown[0]!r} is not carried out here; only slices with merge_method passthrough are"
        )
    if config.get("dtype") is not None:
        raise UsageError(f"{path}: dtype is not carried out here, weights keep their type; leave it out")
    method = config.get("merge_method") or "passthrough"
    if method != "passthrough":
        raise UsageError(f"{path}: merge_method {method!r} mixes weights; only passthrough is understood")
    slices = config.get("slices")
    if not isinstance(slices, list) or not slices:
        raise UsageError(f"{path}: slices is missing or empty")
    models: list[str] = []
    ranges: list[tuple[int, int, int]] = []
    for number, entry in enumerate(slices):
        name, first, last = _source(entry, f"{path}: slices[{number}]")
        if name not in models:
            models.append(name)
        ranges.append((models.index(name), first, last))
    if config.get("base_model") not in (None, models[0]):
        raise UsageError(f"{path}: base_model must be the model of the first slice ({models[0]}), or be left out")
    return Slices(tuple(models), tuple(ranges))


def _source(entry: Any, where: str) -> tuple[str, int, int]:
    sources = entry.get("sources") if isinstance(entry, dict) and set(entry) == {"sources"} else None
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise UsageError(f"{where} must hold one entry under sources, with model and layer_range")
    source: dict[str, Any] = sources[0]
    if set(source) != {"model", "layer_range"}:
        extra = sorted(set(source) - {"model", "layer_range"})
        raise UsageError(
            f"{where}: {extra[0]!r} is not carried out here" if extra else f"{where} lacks model or layer_range"
        )
    bounds = source["layer_range"]
    sound = isinstance(bounds, list) and len(bounds) == 2 and all(type(bound) is int for bound in bounds)
    if not sound or not 0 <= bounds[0] < bounds[1] or not isinstance(source["model"], str):
        raise UsageError(f"{where}: layer_range {bounds!r} must be [first, one behind the last]")
    return source["model"], bounds[0], bounds[1]


def plan_slices(slices: Slices, num_layers: list[int]) -> SurgeryPlan:
    """Return the plan of a mergekit configuration.

    Args:
        slices: What it asks for.
        num_layers: Layers of each of its models.

    Raises:
        UsageError: A range leaves its model, or what stands outside the layers would come from two models.
    """
    if slices.ranges[0][0] != slices.ranges[-1][0]:
        raise UsageError(
            "slices: the first and the last slice must be of one model, which gives embeddings, norm and head"
        )
    layers: list[LayerPlan] = []
    for model, first, last in slices.ranges:
        if last > num_layers[model]:
            raise UsageError(
                f"slices: layer_range [{first}, {last}] leaves {slices.models[model]!r} ({num_layers[model]} layers)"
            )
        layers += [LayerPlan(index, model) for index in range(first, last)]
    return SurgeryPlan(slices.models, tuple(num_layers), tuple(layers), strategy="slices")
