"""Which shape a model is pruned to: requests filled in and checked, budgets, and stops on a long way."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.families import FamilySpec, ModelShape, count_parameters, family_of
from scionlm.recipes.model_shapes import TargetShape
from scionlm.surgery.width import WidthTarget, settle_heads

Config = dict[str, Any]
_LAYERS, _HIDDEN, _MLP, _HEADS, _GROUPS = _SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
# Families whose configuration class wants hidden_size to be a multiple of num_attention_heads, whatever head_dim is.
_WHOLE_HEADS = frozenset({"llama", "gemma2", "gemma3_text"})
# Sizes of candidates are multiples of the first of these that leaves enough choice.
_UNITS, _ENOUGH = (128, 64, 32, 16, 8), 8
_LEAST = 1 / 16  # of each size of the source: gates as published reach down to 0.0471
_RATIO = 1.5  # how far the proportions of a candidate may be from the source's
_BANDS = (0.02, 0.05, 0.1)  # shares of the budget that may be left over; candidates in one band are equally close
_DEVICES = 8  # that heads are commonly divided over, or half or a quarter of them


@dataclass(frozen=True)
class Budget:
    """What a target may take; the narrowest limit counts.

    Attributes:
        parameters: How many parameters.
        memory_bytes: Bytes of all weights.
        seconds_per_token: Time of one token where a single text is continued: of reading all weights or of multiplying
            them, whichever is longer. Attention to the text before is left out.
        bytes_per_parameter: Of the weights in use; 2 in bfloat16.
        bandwidth: Bytes a second that the device reads from its memory.
        peak_flops: Operations a second that it can do.
    """

    parameters: int | None = None
    memory_bytes: int | None = None
    seconds_per_token: float | None = None
    bytes_per_parameter: float = 2.0
    bandwidth: float | None = None
    peak_flops: float | None = None

    def seconds_of(self, parameters: int) -> float | None:
        """Return the seconds per token of a model; None where the device is not described."""
        if self.bandwidth is None or self.peak_flops is None:
            return None
        return max(parameters * self.bytes_per_parameter / self.bandwidth, 2 * parameters / self.peak_flops)

    def narrowest(self) -> tuple[str, float, float]:
        """Return the limit that counts: its name, its value, and how much of it one parameter takes.

        Raises:
            UsageError: There is no limit, a value is not positive, or the device is not described.
        """
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"budget: {name} {value} must be a positive number")
        seconds = self.seconds_of(1)
        if self.seconds_per_token is not None and seconds is None:
            raise UsageError("budget: seconds_per_token needs bandwidth (bytes a second) and peak_flops; set both")
        each = {"parameters": 1.0, "memory_bytes": self.bytes_per_parameter, "seconds_per_token": seconds or 0.0}
        limits = [(name, getattr(self, name), takes) for name, takes in each.items() if getattr(self, name) is not None]
        if not limits:
            raise UsageError(f"budget: nothing is limited; set one of {', '.join(each)}")
        return min(limits, key=lambda limit: limit[1] / limit[2])


@dataclass(frozen=True)
class Candidate:
    """A shape that a budget allows; `seconds_per_token` None: the device is not described. `why`: how good it is."""

    shape: TargetShape
    num_parameters: int
    weight_bytes: int
    seconds_per_token: float | None
    why: str


def config_with(config: Config, shape: TargetShape) -> Config:
    """Return a source's configuration with other sizes: to count with, as it does not say which layers stay."""
    family, sizes = family_of(config), shape.to_dict()
    sizes["head_dim"] = shape.head_dim or ModelShape.of(config).head_dim
    has = {"head_dim": family.has_head_dim, _GROUPS: family.has_kv_heads}
    result = config | {family.key(name): size for name, size in sizes.items() if has.get(name, True)}
    lists = [key for key in family.per_layer_config if isinstance(config.get(key), list)]
    keys = {key: family.key(other) for key, other in family.required_config.items() if isinstance(other, str)}
    result |= {key: config[key][: shape.num_hidden_layers] for key in lists}
    return result | {key: result[other] for key, other in keys.items() if key in config}


def _total(config: Config) -> int:
    return count_parameters(config)["total"]


def complete_target(
    asked: Mapping[str, int | None], source: ModelShape, family: FamilySpec, model_name: str
) -> TargetShape:
    """Return a whole target; what is left open is as in the source, and query heads stay with their key/value heads.

    Args:
        asked: Sizes by Hugging Face's names; None is open. `head_dim` can only be the source's.
        source: The shape that is pruned.
        family: Its family.
        model_name: Its name, for messages.

    Raises:
        UsageError: The source has no such part, or sizes do not divide; says everything that is wrong at once.
    """
    names = (*_SIZES, "head_dim")
    problems = [f"{name} is not a size; sizes are {', '.join(names)}" for name in asked if name not in names]
    wanted = {name: value for name in names if (value := asked.get(name)) is not None}
    if wanted.get("head_dim", source.head_dim) != source.head_dim:
        problems.append(f"head_dim {wanted['head_dim']}: heads keep the source's width; feasible: {source.head_dim}")
    own = wanted.get(_HEADS, source.num_attention_heads)
    if not family.has_kv_heads and wanted.pop(_GROUPS, own) != own:
        problems.append(f"{_GROUPS} {asked[_GROUPS]}: {family.model_types[0]} has no grouped heads; set {_HEADS} only")
    sizes: dict[str, Any] = {name: wanted.get(name, getattr(source, name)) for name in _SIZES}
    beyond = {name: getattr(source, name) for name in _SIZES if not _is_size(sizes[name], getattr(source, name))}
    for name, has in beyond.items():
        what = f"is more than the source's {has}" if _is_size(sizes[name]) else "is not a whole number above 0"
        problems.append(f"{name} {sizes[name]!r} {what}; feasible: 1 to {has}")
    if not beyond.keys() & {_HEADS, _GROUPS}:
        settled = _settled(wanted.get(_HEADS), wanted.get(_GROUPS), source)
        if settled is None:
            problems.append(_feasible_heads(sizes[_HEADS], wanted.get(_GROUPS), source))
        else:
            sizes[_HEADS], sizes[_GROUPS] = settled
            problems += () if _HIDDEN in beyond else _hidden_problems(sizes[_HIDDEN], sizes[_HEADS], source, family)
    if not problems and all(sizes[name] == getattr(source, name) for name in _SIZES):
        problems.append(f"nothing would be pruned; ask for less than the source has of one of {', '.join(_SIZES)}")
    if problems:
        raise UsageError(f"target, cut from {model_name}: {'; '.join(problems)}")
    return TargetShape(**sizes, head_dim=source.head_dim)


def _is_size(value: object, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _settled(heads: int | None, groups: int | None, source: ModelShape) -> tuple[int, int] | None:
    try:
        return settle_heads(WidthTarget(num_attention_heads=heads, num_key_value_heads=groups), source)
    except UsageError:
        return None


def _feasible_heads(heads: int, groups: int | None, source: ModelShape) -> str:
    total, of_groups = source.num_attention_heads, source.num_key_value_heads
    feasible = f"feasible: {_in_words([n for n in range(1, total + 1) if _settled(n, groups, source)])}"
    others = [n for n in range(1, of_groups + 1) if _settled(heads, n, source)]
    if groups and others:
        feasible += f", or {_GROUPS} {_in_words(others)}"
    asked = f"{_HEADS} {heads}" + (f" with {_GROUPS} {groups}" if groups else "")
    return f"{asked}: each key/value head keeps the same number of its {total // of_groups} query heads; {feasible}"


def _in_words(numbers: Sequence[int]) -> str:
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) < 3 or len(steps) > 1:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]} to {numbers[-1]}" + (f" in steps of {steps.pop()}" if steps != {1} else "")


def _hidden_problems(hidden: int, heads: int, source: ModelShape, family: FamilySpec) -> Iterator[str]:
    name, each = family.model_types[0], source.head_dim
    if not family.has_head_dim and hidden != heads * each:
        yield (
            f"{_HIDDEN} {hidden}: {name} has no head_dim setting, so that it is {_HEADS} {heads} times the source's "
            f"{each}; feasible: {heads * each}" + (f", or {_HEADS} {hidden // each}" if hidden % each == 0 else "")
        )
    elif name in _WHOLE_HEADS and hidden % heads:
        feasible = _in_words(range(heads, source.hidden_size + 1, heads))
        yield f"{_HIDDEN} {hidden}: {name} needs a multiple of {_HEADS} {heads}; feasible: {feasible}"


def check_reach(target: TargetShape, source: ModelShape, max_sparsity: float) -> None:
    """Check that learned gates can close as many units as a target asks for.

    At most `max_sparsity` of a row of gates can be expected closed: 0.9529 under the published constraint (parameters
    within log 100), 1.0 under a calibrated one. Rows are as in `train.gates`: query heads are one in each group.

    Raises:
        UsageError: A size is below what gates reach; says the least of each.
    """
    groups, kept = source.num_key_value_heads, target.num_key_value_heads
    inside, kept_inside = source.num_attention_heads // groups, target.num_attention_heads // kept
    rows = [(name, getattr(target, name), getattr(source, name)) for name in (_LAYERS, _HIDDEN, _MLP)]
    rows.append((_HEADS if inside == 1 else _GROUPS, kept, groups))
    rows.append((f"{_HEADS} / {_GROUPS}", kept_inside, inside))
    short = [
        f"{name} {has} of {units} (feasible: {least} or more)"
        for name, has, units in rows
        if has < (least := math.ceil(units * (1 - max_sparsity) - 1e-9))
    ]
    if short:
        raise UsageError(
            f"target: learned gates close {100 * max_sparsity:.4g} % of a row at the most, too few for "
            f"{', '.join(short)}; ask for more, calibrate the constraint, or prune in several steps"
        )


def candidates(source_config: Config, budget: Budget, limit: int = 20) -> list[Candidate]:
    """Return shapes within a budget, the best first: those that use it up and have the source's proportions.

    Sizes divide as hardware likes it, heads stay as wide as they are, and at least half of the layers stay. Shapes that
    leave 2 % of the budget come before those that leave 5 %, then 10 %; among them those whose width is cut evenly and
    whose depth is cut little. Where there is none of these, those nearest to the budget.

    Source: Muralidharan et al. (Minitron), arXiv:2407.14679: width rather than depth, few candidates from a search.

    Raises:
        UsageError: The budget is not one, or no shape between it and the source is feasible; says what is.
        DataError: The configuration is broken.
    """
    source, whole = ModelShape.of(source_config), _total(source_config)
    name, value, each = budget.narrowest()
    most, smallest = math.floor(value / each * (1 + 1e-12)), whole
    found: list[tuple[tuple[float, ...], TargetShape]] = []
    for shape, channels, fixed, per_channel in _skeletons(source_config, source):
        smallest = min(smallest, fixed + per_channel * channels[0])
        if fitting := channels[: bisect_right(channels, (most - fixed) // per_channel)]:
            two = {fitting[-1], min(fitting[-1], shape.intermediate_size)}  # the widest, and the best proportioned
            ranks = {_rank(shape, size, source, 1 - (fixed + per_channel * size) / most): size for size in two}
            found.append((min(ranks), replace(shape, intermediate_size=ranks[min(ranks)])))
    if not smallest <= most < whole:
        form = ".3g" if name == "seconds_per_token" else ",.0f"
        feasible = f"{smallest * each:{form}} to {(whole - 1) * each:{form}}" if smallest < whole else "none"
        raise UsageError(
            f"budget: {name} {value:{form}} allows {most:,} of the source's {whole:,} parameters; feasible: {feasible}"
        )
    found.sort(key=lambda entry: entry[0])
    close = [entry for entry in found if entry[0][0] < len(_BANDS)] or found
    return [_candidate(source_config, source, shape, budget, most) for _, shape in close[:limit]]


def _skeletons(config: Config, source: ModelShape) -> Iterator[tuple[TargetShape, list[int], int, int]]:
    """Yield shapes with a well-proportioned MLP, its feasible sizes, and parameters: a fixed number, and by channel."""
    family, depth, total = family_of(config), source.num_hidden_layers, source.intermediate_size
    whole = TargetShape(*(getattr(source, name) for name in _SIZES), head_dim=source.head_dim)
    groups, inside = source.num_key_value_heads, source.num_attention_heads // source.num_key_value_heads
    kept = product(*(range(math.ceil(_LEAST * number), number + 1) for number in (groups, inside)))
    pairs = [(group * number, group) for group, number in kept]
    for hidden in _choices(source.hidden_size, 1 if family.has_head_dim else source.head_dim):
        share = hidden / source.hidden_size
        channels = [n for n in _choices(total) if share / _RATIO <= n / total <= share * _RATIO]
        fitting = [pair for pair in pairs if not [*_hidden_problems(hidden, pair[0], source, family)]]
        near = [pair for pair in fitting if share / _RATIO <= pair[0] / (groups * inside) <= share * _RATIO]
        for heads, kv_heads in near or fitting[:1] if channels else ():
            ideal = min(channels, key=lambda n: abs(n - share * total))
            shape = TargetShape(depth, hidden, ideal, heads, kv_heads, source.head_dim)
            one, deeper, wider = (
                _total(config_with(config, replace(shape, num_hidden_layers=layers, intermediate_size=size)))
                for layers, size in ((1, 1), (2, 1), (1, 2))
            )
            for layers in range(-(-depth // 2), depth + 1):
                here, per_channel = replace(shape, num_hidden_layers=layers), (wider - one) * layers
                sizes = channels[:-1] if replace(here, intermediate_size=total) == whole else channels
                if sizes:
                    yield here, sizes, one + (deeper - one) * (layers - 1) - per_channel, per_channel


def _choices(total: int, multiple_of: int = 1) -> list[int]:
    step = _unit(total, multiple_of)
    return sorted({*range(step * math.ceil(_LEAST * total / step), total + 1, step), total})


def _unit(total: int, multiple_of: int = 1) -> int:
    units = [math.lcm(unit, multiple_of) for unit in _UNITS]
    return next((unit for unit in units if total // unit >= _ENOUGH), units[-1])


def _rank(shape: TargetShape, channels: int, source: ModelShape, left: float) -> tuple[float, ...]:
    """Return what to sort by: roughly how much of the budget is left over, then what the cut does to the shape."""
    sizes = {name: channels if name == _MLP else getattr(shape, name) for name in _SIZES}
    layers, hidden, mlp, heads, groups = (math.log(getattr(source, name) / sizes[name]) for name in _SIZES)
    cost = abs(mlp - hidden) + abs(heads - hidden) + abs(groups - heads) / 4 + layers / 2 + 2 * max(0, layers - hidden)
    before, after = (math.gcd(one.num_key_value_heads, _DEVICES) for one in (source, shape))
    band = bisect_left(_BANDS, left)
    return band, left * (band == len(_BANDS)), cost + max(0, math.log2(before / after)) / 10, left, *sizes.values()


def _candidate(config: Config, source: ModelShape, shape: TargetShape, budget: Budget, most: int) -> Candidate:
    number = _total(config_with(config, shape))
    stay = (f"{name} {100 * getattr(shape, name) / getattr(source, name):.0f} %" for name in _SIZES)
    devices = math.gcd(shape.num_key_value_heads, _DEVICES)
    why = f"{100 * number / most:.1f} % of the budget; of the source's {', '.join(stay)}; "
    why += f"heads divide over {devices} devices" if devices > 1 else "heads stay on one device"
    return Candidate(shape, number, math.ceil(number * budget.bytes_per_parameter), budget.seconds_of(number), why)


def steps_between(
    source: ModelShape, target: TargetShape, most: float = 1 / 3, family: FamilySpec | None = None
) -> list[TargetShape]:
    """Return the shapes on the way to a target, itself the last: few, geometric as far as whole numbers allow.

    No step takes more than `most` of an axis; where one unit is more than that, one goes at a time. Of heads, those
    inside each group go before groups do. `family` is the source's: without it hidden_size stays a multiple of
    num_attention_heads, by head_dim where source and target have it so. Steps where that cannot be are left out.

    Source: NVIDIA Model-Optimizer's guide to pruning: at most a third in one step.

    Raises:
        UsageError: `most` is not a share.
    """
    if not 0 < most < 1:
        raise UsageError(f"most {most}: the largest share that a step takes must be above 0 and below 1")
    ends = {name: (getattr(source, name), getattr(target, name)) for name in _SIZES}
    first, last = ((heads // groups, groups) for heads, groups in zip(ends[_HEADS], ends[_GROUPS], strict=True))
    by_heads = list(zip(ends[_HIDDEN], ends[_HEADS], strict=True))
    free = family is not None and family.has_head_dim and family.model_types[0] not in _WHOLE_HEADS
    tied = not free and all(hidden == heads * source.head_dim for hidden, heads in by_heads)
    whole = not free and not tied and all(hidden % heads == 0 for hidden, heads in by_heads)
    inner, outer = (_fewest(*pair, most) for pair in zip(first, last, strict=True))
    alone = [_fewest(*ends[name], most) for name in _SIZES[:3] if not (tied and name == _HIDDEN)]
    number = max(*alone, inner + outer if _fewest(*ends[_HEADS], most) > 1 else 1)
    before = number * inner // max(1, inner + outer)  # steps until groups begin to go
    common, devices = math.gcd(*ends[_HIDDEN]) if whole else 0, math.gcd(*ends[_GROUPS], _DEVICES)
    some, others, every = [1] * before, [1] * (number - before), [1] * number
    inside = _chain(first[0], last[0], most, some, 1, common // first[1]) + [last[0]] * len(others)
    groups = [first[1]] * before + _chain(first[1], last[1], most, others, devices, common // last[0])
    heads = [a * b for a, b in zip(inside, groups, strict=True)]
    layers = _chain(*ends[_LAYERS], most, every, 1)
    mlp = _chain(*ends[_MLP], most, every, _unit(source.intermediate_size))
    hidden = [size * source.head_dim for size in heads]
    if not tied:
        hidden = _chain(*ends[_HIDDEN], most, heads if whole else every, _unit(source.hidden_size))
    rows = zip(layers, hidden, mlp, heads, groups, strict=True)
    return [TargetShape(*row, head_dim=target.head_dim) for row in rows if not whole or row[1] % row[3] == 0]


def _fewest(first: int, last: int, most: float) -> int:
    number = 0
    while first > last:
        first, number = _lowest(first, most), number + 1
    return number


def _lowest(size: int, most: float) -> int:
    return min(math.ceil(size * (1 - most) - 1e-9), size - 1)


def _chain(first: int, last: int, most: float, units: Sequence[int], round_one: int, common: int = 0) -> list[int]:
    """Return a size after each step: geometric, rather a multiple of the step's unit, a divisor of `common`, round."""
    highest = [last]  # from which the end can be reached in 0, 1, ... steps
    for _ in units:
        highest.append(max(math.floor(highest[-1] / (1 - most) + 1e-9), highest[-1] + 1))
    sizes = [first]
    for step, unit in enumerate(units, 1):
        ideal = first * (last / first) ** (step / len(units))
        window = range(max(last, _lowest(sizes[-1], most)), min(sizes[-1], highest[len(units) - step]) + 1)
        off = {n: (n % unit > 0 or common % n > 0, -math.gcd(n, round_one), abs(n - ideal)) for n in window}
        sizes.append(min(off, key=off.__getitem__))
    return sizes[1:]
