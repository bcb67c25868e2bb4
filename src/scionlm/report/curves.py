"""Losses over the course of a training run, from the lines of metrics.jsonl.

The keys are `train/nll_nats` and `eval/DOMAIN/nll_nats`, where DOMAIN may itself contain slashes. A loss written as
null was not finite (JSON has no NaN): it becomes NaN here, a gap in the line that is drawn.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from scionlm.report.values import number

_TRAIN, _RATE = "train/nll_nats", "optim/lr"
_PARTS = ("loss_nats", "divergence_nats", "z_loss_nats", "hidden_error_ratio")
_SKIPPED, _SPIKE = "train/skipped_updates", "train/spike_sigmas"
_PREFIX, _SUFFIX = "eval/", "/nll_nats"
_GATES = re.compile(r"prune/(\w+)_(open_share|target_share)")
_Drawn = TypeVar("_Drawn")
_MOVED = re.compile(r"reweight/(.+)/(weight|nll_nats|reference_nats)", re.DOTALL)


@dataclass(frozen=True)
class Point:
    """A loss in nats after so many steps and tokens; NaN where it was not finite."""

    step: int
    tokens: float
    nll: float


@dataclass(frozen=True)
class Curves:
    """Training loss, held-out loss by domain, and the mean of the domains where all of them were measured.

    Also how the weights of domains moved, the learning rate by step, the steps whose update was left out or whose loss
    leapt, what the training loss is made of beside cross-entropy, and of masks the share of units that is expected to
    be open (`open_share`) or asked for (`target_share`), by axis.
    """

    train: tuple[Point, ...] = ()
    domains: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    mean: tuple[Point, ...] = ()
    last_step: int | None = None
    last_tokens: float | None = None
    moves: Mapping[str, tuple["Move", ...]] = field(default_factory=dict)
    lr: tuple[tuple[float, float], ...] = ()
    skipped: tuple[int, ...] = ()
    spikes: tuple[int, ...] = ()
    parts: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    gates: Mapping[str, Mapping[str, tuple[Point, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """A domain's weight from a step on, with the loss and the reference that moved it; NaN where one is not known."""

    step: int
    tokens: float
    weight: float
    nll: float
    reference: float


def read_curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """Return the curves of the metric lines; where a resumed run wrote a step twice, the later line counts."""
    train: dict[int, Point] = {}
    domains: dict[str, dict[int, Point]] = {}
    moves: dict[str, dict[int, Move]] = {}
    rates: dict[int, float] = {}
    noted: dict[str, set[int]] = {_SKIPPED: set(), _SPIKE: set()}
    parts: dict[str, dict[int, Point]] = {}
    gates: dict[str, dict[str, dict[int, Point]]] = {}
    last: tuple[int, float] | None = None
    for line in lines:
        place = _place(line)
        if place is None:
            continue
        last = max(last, place) if last else place
        if _TRAIN in line:
            train[place[0]] = Point(*place, _loss(line, _TRAIN))
        rate = _loss(line, _RATE)
        if math.isfinite(rate):
            rates[place[0]] = rate
        for name in _PARTS:
            if f"train/{name}" in line:
                parts.setdefault(name, {})[place[0]] = Point(*place, _loss(line, f"train/{name}"))
        for key in noted.keys() & line.keys():
            noted[key].add(place[0])
        for key in line:
            if key.startswith(_PREFIX) and key.endswith(_SUFFIX) and len(key) > len(_PREFIX + _SUFFIX):
                domain = key[len(_PREFIX) : -len(_SUFFIX)]
                domains.setdefault(domain, {})[place[0]] = Point(*place, _loss(line, key))
            if match := _GATES.fullmatch(key):
                course = gates.setdefault(match[1], {}).setdefault(match[2], {})
                course[place[0]] = Point(*place, _loss(line, key))
        for domain in dict.fromkeys(match[1] for key in line if (match := _MOVED.fullmatch(key))):
            values = [_loss(line, f"reweight/{domain}/{what}") for what in ("weight", "nll_nats", "reference_nats")]
            moves.setdefault(domain, {})[place[0]] = Move(*place, *values)
    return Curves(
        train=_ordered(train),
        domains={name: _ordered(points) for name, points in domains.items()},
        mean=_mean(list(domains.values())),
        last_step=last[0] if last else None,
        last_tokens=last[1] if last else None,
        moves={name: tuple(points[step] for step in sorted(points)) for name, points in moves.items()},
        lr=tuple((float(step), rates[step]) for step in sorted(rates)),
        skipped=tuple(sorted(noted[_SKIPPED])),
        spikes=tuple(sorted(noted[_SPIKE])),
        parts={name: _ordered(points) for name, points in parts.items()},
        gates={axis: {what: _ordered(points) for what, points in found.items()} for axis, found in gates.items()},
    )


def _place(line: Mapping[str, Any]) -> tuple[int, float] | None:
    step, tokens = number(line, "step"), number(line, "tokens")
    if step is None or tokens is None or not (0 <= step < math.inf and 0 <= tokens < math.inf):
        return None
    return int(step), tokens


def _loss(line: Mapping[str, Any], key: str) -> float:
    value = number(line, key)
    return value if value is not None and math.isfinite(value) else math.nan


def _ordered(points: Mapping[int, Point]) -> tuple[Point, ...]:
    return tuple(points[step] for step in sorted(points))


def _mean(domains: Sequence[Mapping[int, Point]]) -> tuple[Point, ...]:
    if not domains:
        return ()
    common = set(domains[0]).intersection(*domains)
    return tuple(
        Point(step, domains[0][step].tokens, sum(points[step].nll for points in domains) / len(domains))
        for step in sorted(common)
    )


def mean_over(curves: Curves, names: Iterable[str]) -> tuple[Point, ...]:
    """Return the mean of some domains where all of them were measured; nothing where one of them never was."""
    chosen = [curves.domains.get(name, ()) for name in names]
    return _mean([{point.step: point for point in points} for points in chosen])


def averaged(points: Sequence[Point], limit: int) -> tuple[Point, ...]:
    """Return at most `limit` points, each the mean of its neighbors: a training loss is too noisy and long to draw."""
    width = math.ceil(len(points) / limit)
    if width <= 1:
        return tuple(points)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return tuple(Point(g[-1].step, g[-1].tokens, sum(p.nll for p in g) / len(g)) for g in groups)


def thinned(points: Sequence[_Drawn], limit: int) -> tuple[_Drawn, ...]:
    """Return at most `limit` of the points, evenly spread, the first and the last among them."""
    if len(points) <= limit:
        return tuple(points)
    return tuple(points[round(k * (len(points) - 1) / (limit - 1))] for k in range(limit))
