"""`scion inspect`: what a model is, from its configuration and the headers of its weight files."""

from collections import Counter
from math import prod
from typing import Any

from scionlm.families import ModelShape, count_parameters, family_of, flops_per_token
from scionlm.families.shape import check_tensors, expected_tensors
from scionlm.sources import resolve, tensor_index


def inspect_model(name: str) -> dict[str, Any]:
    """Return the facts about a model, after checking that its tensors are those its configuration promises.

    Raises:
        UsageError: There is no such local path.
        DataError: The model is broken or of an unknown family.
    """
    folder = resolve(name)
    family = family_of(folder.config)
    shape = ModelShape.of(folder.config)
    tensors = tensor_index(folder.path)
    found = {tensor: entry.shape for tensor, (_, entry) in tensors.items()}
    check_tensors(family, folder.config, found, str(folder.path))
    counts = count_parameters(family, folder.config)
    layer = Counter[str]()
    for tensor, spec, sizes in expected_tensors(family, folder.config):
        if tensor.startswith(f"{family.layers}.0."):
            layer[spec.part] += prod(sizes)
    dtypes = Counter(entry.dtype for _, entry in tensors.values())
    context = folder.config.get("max_position_embeddings")
    return {
        "name": folder.name,
        "path": str(folder.path),
        "revision": folder.revision,
        "license": folder.license,
        "model_type": folder.config["model_type"],
        "num_parameters": counts.pop("total"),
        "parameters_by_part": counts,
        "max_position_embeddings": context,
        "stored_dtypes": dict(dtypes),
        "flops_per_token": flops_per_token(family, folder.config, 1024),
        "layers": [{"index": i, "num_parameters": layer.total(), **layer} for i in range(shape.num_hidden_layers)],
        **shape.to_dict(),
        **folder.facts,
    }
