"""`scion inspect`: what a model is, from its configuration and the headers of its weight files."""

from collections import Counter
from math import prod
from typing import Any

from scionlm.families import ModelShape, count_parameters, family_of, flops_per_token
from scionlm.families.shape import canonical_names, check_tensors, expected_tensors
from scionlm.sources import resolve, tensor_index


def inspect_model(name: str, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the facts about a model, after checking that its tensors are those its configuration promises.

    Raises:
        UsageError: There is no such local path.
        DataError: The model is broken or of an unknown family.
    """
    folder = resolve(name, allow_pickle=allow_pickle)
    config, family = folder.config, family_of(folder.config)
    shape = ModelShape.of(config, folder.path / "config.json")
    tensors = tensor_index(folder.path)
    names = canonical_names(family, list(tensors))
    check_tensors(config, {full: tensors[own][1].shape for full, own in names.items()}, str(folder.path))
    counts = count_parameters(config)
    layers = [Counter[str]() for _ in range(shape.num_hidden_layers)]
    axes: dict[str, dict[str, Any]] = {}
    for place in expected_tensors(config):
        if place.layer is not None:
            layers[place.layer][place.spec.part] += prod(place.shape)
        if place.layer in (None, 0) and place.head in (None, 0):
            label = place.name.replace(f"{family.layers}.0.", f"{family.layers}.*.")
            axes[label] = {"role": place.spec.role, "axes": list(place.spec.axes), "shape": list(place.shape)}
    from scionlm.surgery.target import per_layer_lists

    lists = per_layer_lists(family, config)
    return {
        "name": folder.name,
        "path": str(folder.path),
        "revision": folder.revision,
        "license": folder.license,
        "model_type": config["model_type"],
        "num_parameters": counts.pop("total"),
        "parameters_by_part": counts,
        "max_position_embeddings": family.get(config, "max_position_embeddings"),
        "stored_dtypes": dict(Counter(entry.dtype for _, entry in tensors.values())),
        "num_files": len({file for file, _ in tensors.values()}),
        "num_bytes": sum(file.stat().st_size for file in {file for file, _ in tensors.values()}),
        "flops_per_token": flops_per_token(config, 1024),
        "layers": [
            {"index": i, "num_parameters": layer.total(), **layer} | {key: value[i] for key, value in lists.items()}
            for i, layer in enumerate(layers)
        ],
        "tensors": axes,
        **shape.to_dict(),
        **folder.facts,
    }
