"""Which layers of the source become the target's: by number, by list, by strategy, by score; and how a model grows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from scionlm.core.config import nearest
from scionlm.core.errors import UsageError
from scionlm.families.shape import MAX_LAYERS
from scionlm.surgery.indices import parse_indices
from scionlm.surgery.plan import LayerPlan, SurgeryPlan

# On a 30-layer source three recovered best at 8 layers kept and did well at 15 (docs/results/demo-strategy.md).
_LAST_LAYERS = 3
GrowthInit = Literal["source_next", "stack", "zero_output", "random"]
GROWTH: tuple[GrowthInit, ...] = ("source_next", "stack", "zero_output", "random")


def _first(layers: int, total: int, argument: int | None) -> list[int]:
    return list(range(layers))


def _last(layers: int, total: int, argument: int | None) -> list[int]:
    return list(range(total - layers, total))


def _middle(layers: int, total: int, argument: int | None) -> list[int]:
    start = (total - layers) // 2
    return list(range(start, start + layers))


def _every(layers: int, total: int, argument: int | None) -> list[int]:
    return list(range(0, total, argument or total // layers))[:layers]


def _first_last(layers: int, total: int, argument: int | None) -> list[int]:
    last = min(_LAST_LAYERS if argument is None else argument, layers // 2 if argument is None else layers)
    return [*range(layers - last), *range(total - last, total)]


def _spaced(layers: int, total: int, argument: int | None) -> list[int]:
    if layers == 1:
        return [0]
    return [round(i * (total - 1) / (layers - 1)) for i in range(layers)]


def _random(layers: int, total: int, argument: int | None) -> list[int]:
    order = np.random.default_rng(argument or 0).permutation(total)
    return sorted(int(index) for index in order[:layers])


def _stack(layers: int, total: int, argument: int | None) -> list[int]:
    return [i % total for i in range(layers)]


def _hybrid_stack(layers: int, total: int, argument: int | None) -> list[int]:
    return [i % (layers // 2) for i in range(layers)]


STRATEGIES: dict[str, tuple[Callable[[int, int, int | None], list[int]], str]] = {
    "first": (_first, "the first N layers, as Inheritune does"),
    "last": (_last, "the last N layers"),
    "middle": (_middle, "N layers from the middle"),
    "every": (_every, "every K-th layer from the first on (every:K), at most N"),
    "first_last": (_first_last, "the last three of N (at most half; first_last:K takes K), the others from the start"),
    "spaced": (_spaced, "N layers evenly spaced, the first and the last among them"),
    "random": (_random, "N layers drawn at random (random:K draws others)"),
    "stack": (
        _stack,
        "all layers, then all again from the first on, until there are N (Inheritune's stacking baseline)",
    ),
    "hybrid_stack": (_hybrid_stack, "the first N/2 layers, twice (Inheritune's hybrid stacking baseline)"),
}
"""Name to (rule of N, the source's layers and the argument behind the colon; what it does)."""
_TAKE_ARGUMENT = ("every", "first_last", "random")


def parse_keep(text: str) -> list[int]:
    """Return the layers that `0-7,12` or `0-29:2` names; see `parse_indices`."""
    return parse_indices(text, "keep", most=MAX_LAYERS)


def plan_depth(
    num_source_layers: int,
    layers: int | None = None,
    keep: Sequence[int] | None = None,
    strategy: str | None = None,
    scores: Sequence[float] | None = None,
    *,
    repeat: bool = False,
    name: str = "source",
) -> SurgeryPlan:
    """Return the plan for a source of `num_source_layers`.

    Args:
        num_source_layers: Layers of the source, numbered from 0.
        layers: How many to keep.
        keep: Which to keep, in order; excludes the others.
        strategy: How to choose `layers` of them; `first` when not given.
        scores: One for each layer, higher for more important: keep the `layers` best, in their order.
        repeat: Whether `keep` may name a layer twice.
        name: The source's, for the plan.

    Raises:
        UsageError: Neither or both of `layers` and `keep`, a number out of range, a layer twice, an unknown strategy.
    """
    total = num_source_layers

    def plan(indices: Sequence[int], how: str) -> SurgeryPlan:
        return SurgeryPlan((name,), (total,), tuple(LayerPlan(index) for index in indices), strategy=how)

    valid = f"the source has {total} layers, 0 to {total - 1}"
    if keep is not None:
        if strategy is not None or layers is not None or scores is not None:
            raise UsageError("keep names the layers already; leave layers, strategy and scores out")
        outside = [index for index in keep if not 0 <= index < total]
        if outside:
            raise UsageError(f"keep: layer {outside[0]} does not exist; {valid}")
        if len(set(keep)) != len(keep) and not repeat:
            raise UsageError("keep: a layer stands twice; each is inherited once, unless repeating is asked for")
        if not keep:
            raise UsageError("keep: no layer is kept")
        return plan(keep, "explicit")
    if scores is not None:
        return plan(_best(scores, layers, total, strategy), "scores")
    chosen, how = _by_strategy(strategy or "first", layers, total, valid)
    return plan(chosen, how)


def _by_strategy(rule: str, layers: int | None, total: int, valid: str) -> tuple[list[int], str]:
    strategy, _, text = rule.partition(":")
    if strategy not in STRATEGIES:
        raise UsageError(
            f"strategy {strategy!r} is unknown{nearest(strategy, list(STRATEGIES))} (known: {', '.join(STRATEGIES)})"
        )
    argument = int(text) if text.isascii() and text.isdigit() and len(text) < 7 else None
    if text and strategy not in _TAKE_ARGUMENT:
        raise UsageError(f"strategy {strategy}:{text[:40]}: only {' and '.join(_TAKE_ARGUMENT)} take a number there")
    least = 1 if strategy == "every" else 0
    if text and (argument is None or argument < least):
        raise UsageError(f"strategy {strategy}:{text[:40]}: the number behind the colon must be {least} or more")
    if layers is None and strategy == "every" and argument:
        layers = -(-total // argument)
    if layers is None:
        raise UsageError("say either how many layers to keep (layers) or which (keep)")
    most = {"stack": 8 * total, "hybrid_stack": 2 * total}.get(strategy, total)
    if not 1 <= layers <= most or (strategy == "hybrid_stack" and layers % 2):
        even = "an even number, " if strategy == "hybrid_stack" else ""
        raise UsageError(f"layers: {layers} cannot be made with {strategy} ({even}1 to {most}); {valid}")
    if argument is not None and strategy == "first_last" and argument > layers:
        raise UsageError(f"strategy first_last:{argument}: more than the {layers} layers to keep")
    chosen = STRATEGIES[strategy][0](layers, total, argument)
    if len(chosen) < layers:
        raise UsageError(f"strategy every:{argument} of {total} layers gives {len(chosen)}, not {layers}")
    return chosen, rule


def _best(scores: Sequence[float], layers: int | None, total: int, strategy: str | None) -> list[int]:
    if strategy is not None:
        raise UsageError("scores choose the layers; leave strategy out")
    if layers is None or not 1 <= layers <= total:
        raise UsageError(f"layers: {layers} cannot be chosen by score; the source has {total} layers")
    if len(scores) != total:
        raise UsageError(f"there are {len(scores)} layer scores, but the source has {total} layers")
    if any(math.isnan(score) for score in scores):
        raise UsageError("a layer score is not a number (NaN)")
    return sorted(sorted(range(total), key=lambda index: (-scores[index], index))[:layers])


def plan_growth(
    names: Sequence[str],
    num_layers: int,
    layers: int,
    init: GrowthInit,
    inherited: Sequence[int] | None = None,
    num_donor_layers: int | None = None,
    seed: int = 0,
) -> SurgeryPlan:
    """Return the plan that grows a trained model to `layers` layers; what it has stays as it is.

    Args:
        names: The model's and, for `source_next`, the donor's.
        num_layers: Layers the model has.
        layers: Layers it is to have.
        init: `source_next` adds the first layers of the donor that the model does not have, each at its place in the
            donor's order; `stack` adds copies of its own from the first on; `zero_output` spreads fresh layers that
            pass their input on evenly between the others; `random` adds freshly initialized ones at the end.
        inherited: For `source_next`: which of the donor's layers the model began with; None: the first ones.
        num_donor_layers: For `source_next`: layers of the donor.
        seed: Of fresh weights.

    Raises:
        UsageError: The model is not to grow, or the donor has no further layers.
    """
    if layers <= num_layers:
        raise UsageError(f"layers: {layers} is no growth; the model has {num_layers} layers already")
    own = [LayerPlan(index) for index in range(num_layers)]
    added = layers - num_layers
    plan = SurgeryPlan((names[0],), (num_layers,), (), seed=seed, strategy=f"grow:{init}")
    if init == "stack":
        return replace(plan, layers=(*own, *(LayerPlan(i % num_layers) for i in range(added))))
    if init == "random":
        return replace(plan, layers=(*own, *(LayerPlan(num_layers - 1, init="random") for _ in range(added))))
    if init == "zero_output":
        behind = [((i + 1) * num_layers) // added - 1 for i in range(added)]
        grown = [
            piece
            for layer in own
            for piece in (
                layer,
                *(LayerPlan(layer.index, init="zero_output") for _ in range(behind.count(layer.index))),
            )
        ]
        grown = [LayerPlan(0, init="zero_output") for _ in range(behind.count(-1))] + grown
        return replace(plan, layers=tuple(grown))
    origin = list(range(num_layers)) if inherited is None else list(inherited)
    if num_donor_layers is None or len(names) < 2:
        raise UsageError("growing by source_next needs the model that the layers come from; name it as the donor")
    if (
        len(origin) != num_layers
        or origin != sorted(set(origin))
        or not 0 <= origin[0] <= origin[-1] < num_donor_layers
    ):
        raise UsageError(
            "the model's layers are not some of the donor's, each once and in order; choose another way to grow"
        )
    more = [index for index in range(num_donor_layers) if index not in origin][:added]
    if len(more) < added:
        raise UsageError(f"layers: {layers} cannot be reached; the donor has only {num_donor_layers} layers")
    placed = dict(zip(origin, own, strict=True)) | {index: LayerPlan(index, donor=1) for index in more}
    return replace(
        plan,
        donors=(names[0], names[1]),
        donor_layers=(num_layers, num_donor_layers),
        layers=tuple(placed[index] for index in sorted(placed)),
    )
