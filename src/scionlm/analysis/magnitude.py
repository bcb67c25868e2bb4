"""How large the weights of each head and channel are: importance without a model that runs and without text."""

from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scionlm.analysis.importance import Scores, finite
from scionlm.families import FamilySpec, ModelShape, family_of
from scionlm.families.shape import TensorPlace, axis_size, expected_tensors
from scionlm.families.weights import Weights

_BLOCK_WEIGHTS = 2**22
_COUNTS = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}


def magnitude_scores(config: dict[str, Any], weights: Weights) -> Scores:
    """Return the root of the sum of squares of every weight that belongs to a head or channel.

    A channel's are those that have it on an axis: rows, columns, biases and norm gains; for `hidden` also embeddings
    and an untied head. A head's are its query rows, its columns of the output projection, norms of its own, and all of
    the key/value head that it reads, which counts in full for each query head of the group.

    Args:
        config: The model's `config.json`.
        weights: Its tensors; read once, in blocks of rows.

    Returns:
        `hidden`, `heads` and `ffn`, of the shapes in `analysis.importance`.

    Raises:
        DataError: A score is not finite.

    Source: Li et al. 2017, arXiv:1608.08710 (norms of filters); whole coupled groups as in Ma et al. 2023
        (LLM-Pruner), arXiv:2305.11627.
    Differs: L2 in place of Li et al.'s L1. Norm gains count as they act: Gemma stores them as offsets from one.
    """
    family, shape = family_of(config), ModelShape.of(config)
    layers = shape.num_hidden_layers
    squares = {
        "hidden": np.zeros(shape.hidden_size),
        "heads": np.zeros((layers, shape.num_attention_heads)),
        "ffn": np.zeros((layers, shape.intermediate_size)),
    }
    for place in expected_tensors(config):
        sums = _axis_sums(place, weights, family)
        for axis, values in zip(place.spec.axes, sums, strict=True):
            for part, segment in _segments(axis, values, family, config, shape):
                if part == "hidden":
                    squares["hidden"] += segment
                elif part == "ffn":
                    squares["ffn"][place.layer] += segment
                elif part in ("heads", "kv_heads", "qkv_heads"):
                    squares["heads"][place.layer] += _by_query_head(segment, part, shape)
                elif place.head is not None and place.spec.repeat is not None:
                    own = np.zeros(getattr(shape, _COUNTS[place.spec.repeat]))
                    own[place.head] = segment.sum()
                    squares["heads"][place.layer] += _by_query_head(own, place.spec.repeat, shape)
    return finite({name: np.sqrt(values) for name, values in squares.items()})


def _axis_sums(place: TensorPlace, weights: Weights, family: FamilySpec) -> list[NDArray[np.float64]]:
    """Return the sum of squares at each index of each axis of a tensor."""
    is_gain = place.spec.role.endswith("_norm") and place.spec.name.endswith(".weight")
    sums = [torch.zeros(size, dtype=torch.float64) for size in place.shape]
    rows = max(1, _BLOCK_WEIGHTS // prod(place.shape[1:]))
    for start in range(0, place.shape[0], rows):
        stop = min(start + rows, place.shape[0])
        block = weights.rows(place.name, start, stop).double()
        block = (block + family.norm_offset if is_gain else block).square()
        sums[0][start:stop] = block.reshape(stop - start, -1).sum(1)
        if len(sums) > 1:
            sums[1] += block.sum(0)
    return [values.numpy() for values in sums]


def _segments(
    axis: str, values: NDArray[np.float64], family: FamilySpec, config: dict[str, Any], shape: ModelShape
) -> list[tuple[str, NDArray[np.float64]]]:
    """Return the parts of a fused axis with their names."""
    parts = axis.split("+")
    ends = np.cumsum([axis_size(part, family, config, shape) for part in parts])
    return list(zip(parts, np.split(values, ends[:-1]), strict=True))


def _by_query_head(values: NDArray[np.float64], axis: str, shape: ModelShape) -> NDArray[np.float64]:
    if axis != "kv_heads":
        return values.reshape(shape.num_attention_heads, -1).sum(1)
    groups = values.reshape(shape.num_key_value_heads, -1).sum(1)
    return np.repeat(groups, shape.num_attention_heads // shape.num_key_value_heads)
