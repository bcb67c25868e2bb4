"""Where each layer of a model of Scion's came from: kept in its provenance, carried on when it is cut or grown."""

from typing import Any

from scionlm.core.errors import DataError, UsageError
from scionlm.core.log import warn
from scionlm.core.records import read_json
from scionlm.families import ModelShape
from scionlm.sources import ModelFolder
from scionlm.surgery.plan import SurgeryPlan

Origins = list[list[dict[str, Any]]]
"""For each layer the models that it was a layer of, newest first: `name`, `index` there, `of` how many. Fresh: none."""


def origins(folder: ModelFolder) -> Origins | None:
    """Return where a model's layers came from; None where it has no provenance, or began at random.

    Raises:
        DataError: Its provenance is broken.
    """
    path = folder.path / "provenance.json"
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("init") == "random":
        return None
    try:
        found = record["origins"] if "origins" in record else _of_plan(SurgeryPlan.from_dict(record["plan"]))
        return [
            [{"name": str(step["name"]), "index": int(step["index"]), "of": int(step["of"])} for step in steps]
            for steps in found
        ]
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not say what the model was made of ({error})") from error


def _of_plan(plan: SurgeryPlan) -> Origins:
    return [
        [{"name": plan.donors[layer.donor], "index": layer.index, "of": plan.donor_layers[layer.donor]}]
        if layer.init == "source"
        else []
        for layer in plan.layers
    ]


def plan_origins(folders: list[ModelFolder], plan: SurgeryPlan) -> Origins:
    """Return where the layers come from that a plan makes of these donors."""
    known = [origins(folder) for folder in folders]
    result: Origins = []
    for steps, layer in zip(_of_plan(plan), plan.layers, strict=True):
        before = known[layer.donor] or []
        result.append(steps + before[layer.index] if steps and layer.index < len(before) else steps)
    return result


def inherited_layers(folder: ModelFolder, donor: ModelFolder) -> list[int] | None:
    """Return which of the donor's layers a model began with, by its provenance; None where it has none.

    Raises:
        UsageError: It was made from another model, or has layers of its own.
        DataError: Its provenance is broken.
    """
    found = origins(folder)
    if found is None:
        return None
    total = ModelShape.of(donor.config).num_hidden_layers
    named = [next((step["index"] for step in steps if step["name"] == donor.name), None) for steps in found]
    alike = [next((step["index"] for step in steps if step["of"] == total), None) for steps in found]
    if None not in named:
        return [index for index in named if index is not None]
    if None in alike:
        names = sorted({step["name"] for steps in found for step in steps})
        raise UsageError(
            f"not every layer of {folder.name} was one of {donor.name} ({total} layers); it was made from "
            f"{', '.join(names) or 'nothing'}: name the model that all its layers come from as the donor"
        )
    warn(f"{folder.name} was not made from a model of the name {donor.name}; taking it for the same model")
    return [index for index in alike if index is not None]
