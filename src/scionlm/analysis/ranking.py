"""What layers are worth by each criterion, how far criteria agree, and which layers each would keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

# What the mean of a few ranks may lose to rounding.
_ROUNDING = 1e-9

CRITERIA: dict[str, str] = {
    "removal": "loss without the layer, less the loss with it (nats)",
    "taylor": "the same to first order (nats)",
    "block_influence": "1 - cosine of what goes in and what comes out",
    "angular_distance": "angle between the last token before and after, over pi",
    "update_norm": "norm of what the layer adds over that of what it reads",
    "cka_distance": "1 - CKA of the hidden states before and after",
    "lens": "how far the layer lowers the loss of final norm and head put behind it (nats)",
    "weight_norm": "L2 norm of the layer's weights",
    "max_rank": "approximate rank of its attention, of the head where it is largest",
    "mean_mass": "columns that hold most of the attention, mean over heads",
}
"""What each criterion is; the higher, the more a layer is worth. The first one that was measured is the default."""

WAYS = {
    "angular_block": "all but the consecutive layers that turn the last token least",
    "greedy": "one layer after another is taken out, each time the one that costs least loss",
}
"""Ways to choose layers together, which are no score of each."""


@dataclass(frozen=True)
class Suggestion:
    """Layers to keep.

    Attributes:
        by: The criterion, or how it was found.
        keep: The layers, ascending.
        why: In a few words.
    """

    by: str
    keep: list[int]
    why: str


def best_layers(scores: Vector, number: int) -> list[int]:
    """Return the `number` layers of the highest scores, ascending; ties go to the earlier one."""
    return sorted(np.argsort(-scores, kind="stable")[:number].tolist())


def rank_correlation(scores: Mapping[str, Vector]) -> NDArray[np.float64]:
    """Return Spearman's correlation of each two criteria; 0 where one does not tell layers apart.

    Equal scores share the mean of their places.
    """
    places = np.stack([_places(values) for values in scores.values()])
    centered = places - places.mean(1, keepdims=True)
    norms = np.linalg.norm(centered, axis=1)
    products = np.outer(norms, norms)
    return np.divide(centered @ centered.T, products, out=np.zeros_like(products), where=products > 0)


def _places(values: Vector) -> Vector:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2.0)[inverse].astype(np.float64)


def lazy_layers(max_rank: Vector, tolerance: float) -> list[int]:
    """Return the layers in which every head has collapsed: MaxRank below 1 + `tolerance`.

    Differs: The paper has MaxRank = 1, which a single sequence of a single head undoes; 0.5 is its floor rule for
        groups, applied to a layer.
    """
    return np.flatnonzero(max_rank < 1.0 + tolerance).tolist()


def is_lazy_group(max_rank: Vector) -> bool:
    """Return whether a group of layers is lazy: the floor of its AvgRank, the mean of their MaxRank, is 1."""
    return bool(len(max_rank)) and int(np.floor(max_rank.mean() + _ROUNDING)) == 1


def layers_before_lazy_group(max_rank: Vector) -> int:
    """Return how many layers stand before the longest lazy group at the end; all of them where there is none.

    A group is of two layers or more.
    """
    starts = range(1, len(max_rank) - 1)
    return next((first for first in starts if is_lazy_group(max_rank[first:])), len(max_rank))


def potent_prefix(max_rank: Vector, tolerance: float) -> int:
    """Return how many layers stand before the first lazy one; all of them where there is none."""
    lazy = lazy_layers(max_rank, tolerance)
    return lazy[0] if lazy else len(max_rank)


def closest_block(angular: NDArray[np.float64], number: int) -> list[int]:
    """Return the layers that stay when the `number` consecutive ones go that turn the last token least.

    Args:
        angular: Angular distance of hidden states, `[L + 1, L + 1]`.
        number: How many go, fewer than there are.

    Source: Gromov et al. 2024, arXiv:2403.17887, section 3.1.
    """
    total = len(angular) - 1
    distances = [angular[start, start + number] for start in range(total - number + 1)]
    start = int(np.argmin(distances))
    return [index for index in range(total) if not start <= index < start + number]


def suggest(
    scores: Mapping[str, Vector],
    number: int,
    angular: NDArray[np.float64],
    greedy: Sequence[int] | None,
    tolerance: float,
) -> list[Suggestion]:
    """Return which `number` layers each criterion would keep, and how many the ranks of attention speak for, if any.

    Args:
        scores: Criterion to one number a layer.
        number: How many layers to keep.
        angular: See `closest_block`.
        greedy: Layers in the order in which greedy removal took them; None where it was not done.
        tolerance: See `lazy_layers`.
    """
    total = len(angular) - 1
    found = [Suggestion("first", list(range(number)), "the first layers, as Inheritune does")]
    found += [Suggestion(name, best_layers(values, number), CRITERIA[name]) for name, values in scores.items()]
    if number < total:
        found.append(Suggestion("angular_block", closest_block(angular, total - number), WAYS["angular_block"]))
    if greedy is not None and total - number <= len(greedy):
        gone = set(greedy[: total - number])
        found.append(Suggestion("greedy", [index for index in range(total) if index not in gone], WAYS["greedy"]))
    ranks = scores.get("max_rank")
    if ranks is not None:
        depth, prefix = layers_before_lazy_group(ranks), potent_prefix(ranks, tolerance)
        if depth < total:
            why = f"layers {depth} to {total - 1} are a lazy group: the layers before it"
            found.append(Suggestion("before_lazy_group", list(range(depth)), why))
        if prefix not in (0, depth, total):
            why = f"layer {prefix} is lazy: the layers before it"
            found.append(Suggestion("potent_prefix", list(range(prefix)), why))
    return found
