"""What runs that continue a model learned and forgot, set against each other: the frontier between the two.

Each is measured from where it began, its source, so that the start is the point (0, 0):

    forgetting = upstream mean - the source's         adaptation = the source's downstream mean - downstream mean
    net        = adaptation - forgetting              all in nats, plain means over domains

Upstream are the evaluated domains that the source knew, downstream the others. What did not continue a model (from
scratch, on all text at once, a control) is a baseline: it is measured from the same start, but is no choice.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scionlm.report.compare_read import Base, Row
from scionlm.report.findings import mean_of
from scionlm.report.settings_read import source_label, without_seed

# Losses that agree so far are those of the same model.
_SAME = 1e-4


@dataclass(frozen=True)
class Start:
    """A source that runs continue, or several that differ by their seed alone: its means, and the keys it has."""

    name: str
    upstream: float
    downstream: float
    keys: frozenset[str]


@dataclass(frozen=True)
class Field:
    """What all are measured on, and where they start, the most common start first."""

    upstream: tuple[str, ...]
    downstream: tuple[str, ...]
    starts: tuple[Start, ...] = ()


@dataclass(frozen=True)
class Balance:
    """The means of a row, and what they are against its start; None where there is no start or they are not final."""

    upstream: float | None
    downstream: float | None
    forgetting: float | None = None
    adaptation: float | None = None
    start: str | None = None

    @property
    def net(self) -> float | None:
        """What it gained less what it forgot."""
        return None if self.forgetting is None or self.adaptation is None else self.adaptation - self.forgetting


@dataclass(frozen=True)
class Value:
    """The mean over seeds, and their standard deviation; None with one seed."""

    mean: float
    std: float | None

    @property
    def ends(self) -> tuple[float, float]:
        """One standard deviation below and above."""
        return self.mean - (self.std or 0.0), self.mean + (self.std or 0.0)


@dataclass(frozen=True)
class Point:
    """Runs that differ by their seed alone, one or more; `baseline` where they did not continue a model."""

    name: str
    rows: tuple[str, ...]
    baseline: bool
    upstream: Value
    downstream: Value
    forgetting: Value
    adaptation: Value
    net: Value
    start: str
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Frontier:
    """Everything that is drawn.

    Attributes:
        field: What is measured.
        points: By net, the largest first.
        non_dominated: Those that continue a model, of which none other (nor the start) forgets no more and gains no
            less; from the one that forgets least on.
        recommended: That of the largest net, of those that the spread of seeds does not tell from it the one that
            forgets least; None where the largest net is not above 0.
        tied: The others that seeds do not tell from the largest net, and which forget more.
        differing: Names of settings that are not the same in all that continue.
        left_out: Rows that know other domains, so that their means are of something else.
    """

    field: Field
    points: tuple[Point, ...]
    non_dominated: tuple[Point, ...]
    recommended: Point | None
    tied: tuple[Point, ...]
    differing: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def candidates(self) -> list[Point]:
        """The points that are a choice."""
        return [point for point in self.points if not point.baseline]

    def point_of(self, row: str) -> Point | None:
        """Return the point that a row is part of."""
        return next((point for point in self.points if row in point.rows), None)


def field_of(rows: Sequence[Row], domains: Sequence[str]) -> Field | None:
    """Return what rows that compare are measured on: as most of those that continue a model have it, else as most do.

    None where no row says what is upstream, or nothing is left that is downstream.
    """
    found = [row for row in rows if _known(row, domains)]
    decisive = [row for row in found if row.continues and row.done] or [row for row in found if row.continues] or found
    if not decisive:
        return None
    usual = Counter(_known(row, domains) for row in decisive).most_common(1)[0][0]
    old = tuple(name for name in domains if name in usual)
    new = tuple(name for name in domains if name not in usual)
    return replace(Field(old, new), starts=_starts(rows, Field(old, new))) if new else None


def _known(row: Row, domains: Iterable[str]) -> frozenset[str]:
    return frozenset(row.upstream) & frozenset(domains)


def _agrees(row: Row, field: Field) -> bool:
    """Whether its means are of the same domains; one that names none has nothing against them."""
    known = _known(row, (*field.upstream, *field.downstream))
    return not known or known == frozenset(field.upstream)


def _starts(rows: Iterable[Row], field: Field) -> tuple[Start, ...]:
    found: dict[str, dict[str, Base]] = {}
    for row in rows:
        base = row.base
        if row.continues and base is not None and _agrees(row, field) and _means(base.losses, field) is not None:
            alike = without_seed(base.name)
            # By name alone two models in folders of the same name would be one; by key alone those of two seeds, two.
            same = alike if alike != base.name else f"{alike} {base.key}"
            found.setdefault(same, {})[base.key] = base
    uses = Counter(row.base.key for row in rows if row.continues and row.base is not None)
    groups = sorted(found.values(), key=lambda bases: -sum(uses[key] for key in bases))
    labels = [source_label(next(iter(bases.values())).name) for bases in groups]
    return tuple(
        _start(label if labels.count(label) == 1 else next(iter(bases.values())).name, list(bases.values()), field)
        for label, bases in zip(labels, groups, strict=True)
    )


def _start(name: str, bases: Sequence[Base], field: Field) -> Start:
    means = [pair for base in bases if (pair := _means(base.losses, field)) is not None]
    return Start(
        name,
        statistics.fmean(upstream for upstream, _ in means),
        statistics.fmean(downstream for _, downstream in means),
        frozenset(base.key for base in bases),
    )


def _means(losses: Mapping[str, float], field: Field) -> tuple[float, float] | None:
    upstream, downstream = mean_of(losses, field.upstream), mean_of(losses, field.downstream)
    return None if upstream is None or downstream is None else (upstream, downstream)


def balance_of(row: Row, field: Field | None) -> Balance | None:
    """Return the balance of a row that compares; None where its means are of something else."""
    if field is None or not row.losses or not _agrees(row, field):
        return None
    upstream, downstream = mean_of(row.losses, field.upstream), mean_of(row.losses, field.downstream)
    found = Balance(upstream, downstream)
    if not row.done or upstream is None or downstream is None or not field.starts:
        return found
    key = row.base.key if row.base is not None else None
    start = next((one for one in field.starts if key in one.keys), None)
    # A seed whose source has the same seed starts where that very one stood, not at the mean of all of them.
    own = _means(row.base.losses, field) if start is not None and row.base is not None else None
    if start is None and row.continues:
        return found
    start = start or field.starts[0]
    before = own or (start.upstream, start.downstream)
    return replace(found, forgetting=upstream - before[0], adaptation=before[1] - downstream, start=start.name)


def frontier_of(
    groups: Iterable[tuple[str, Sequence[Row]]], field: Field | None, rows: Iterable[Row]
) -> Frontier | None:
    """Return the frontier of groups of finished rows that compare; None where no run that continues is among them.

    Args:
        groups: Name and rows, which differ by their seed alone.
        field: What they are measured on.
        rows: Every row that compares.
    """
    if field is None or not field.starts:
        return None
    found = [point for name, members in groups if (point := _point(name, members, field)) is not None]
    points = sorted(found, key=lambda point: -point.net.mean)
    candidates = [point for point in points if not point.baseline]
    if not candidates:
        return None
    non_dominated = _non_dominated(candidates)
    recommended, tied = _recommended(candidates, non_dominated)
    keys = dict.fromkeys(key for point in candidates for key in point.settings)
    return Frontier(
        field=field,
        points=tuple(points),
        non_dominated=non_dominated,
        recommended=recommended,
        tied=tied,
        differing=tuple(key for key in keys if len({point.settings.get(key) for point in candidates}) > 1),
        left_out=tuple(row.name for row in rows if row.losses and not _agrees(row, field)),
    )


def _point(name: str, members: Sequence[Row], field: Field) -> Point | None:
    first = members[0]
    balances = [balance_of(row, field) for row in members]
    whole = [one for one in balances if one is not None and one.net is not None and one.start is not None]
    if len(whole) < len(members):
        return None
    forgetting, adaptation, net = (_value([getattr(one, key) for one in whole]) for key in _KEYS)
    if not first.continues and max(abs(forgetting.mean), abs(adaptation.mean)) < _SAME:
        return None  # the source itself, which is the start
    return Point(
        name=name,
        rows=tuple(row.name for row in members),
        baseline=not first.continues,
        upstream=_value([one.upstream for one in whole]),
        downstream=_value([one.downstream for one in whole]),
        forgetting=forgetting,
        adaptation=adaptation,
        net=net,
        start=str(whole[0].start),
        settings=first.settings,
    )


_KEYS = ("forgetting", "adaptation", "net")


def _value(values: Sequence[float | None]) -> Value:
    known = [value for value in values if value is not None]
    return Value(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _non_dominated(candidates: Sequence[Point]) -> tuple[Point, ...]:
    places = [(0.0, 0.0), *((point.forgetting.mean, point.adaptation.mean) for point in candidates)]

    def beaten(x: float, y: float) -> bool:
        return any(other != (x, y) and other[0] <= x and other[1] >= y for other in places)

    left = [point for point in candidates if not beaten(point.forgetting.mean, point.adaptation.mean)]
    return tuple(sorted(left, key=lambda point: (point.forgetting.mean, point.adaptation.mean)))


def _recommended(candidates: Sequence[Point], non_dominated: Sequence[Point]) -> tuple[Point | None, tuple[Point, ...]]:
    best = candidates[0]
    if best.net.mean <= 0:
        return None, ()  # the source is the better choice
    close = [one for one in candidates if one.net.mean > 0 and _untold(one, best)]
    chosen = min((one for one in close if one in non_dominated), key=lambda one: one.forgetting.mean)
    tied = (one for one in candidates if one is not chosen and _untold(one, chosen))
    return chosen, tuple(one for one in tied if one.forgetting.mean > chosen.forgetting.mean)


def _untold(one: Point, other: Point) -> bool:
    """Return whether the spread of seeds is as large as the difference of two nets."""
    return abs(one.net.mean - other.net.mean) <= (one.net.std or 0) + (other.net.std or 0)


def balance_record(balance: Balance | None) -> dict[str, float | None]:
    """Return what compare.json says of a row."""
    return {key: getattr(balance, key, None) for key in ("upstream", "downstream", *_KEYS)}


def frontier_record(frontier: Frontier | None) -> dict[str, Any] | None:
    """Return what compare.json says of the frontier."""
    if frontier is None:
        return None
    field, chosen = frontier.field, frontier.recommended
    starts = [{"name": one.name, "upstream": one.upstream, "downstream": one.downstream} for one in field.starts]
    return {
        "upstream": list(field.upstream),
        "downstream": list(field.downstream),
        "start": starts[0],
        "starts": starts,
        "points": [_point_record(point) for point in frontier.points],
        "non_dominated": [point.name for point in frontier.non_dominated],
        "recommended": chosen.name if chosen is not None else None,
        "not_told_apart": [point.name for point in frontier.tied],
        "left_out": list(frontier.left_out),
    }


def _point_record(point: Point) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in ("upstream", "downstream", *_KEYS):
        value: Value = getattr(point, key)
        values |= {key: value.mean, f"{key}_std": value.std}
    return {
        "name": point.name,
        "rows": list(point.rows),
        "n": len(point.rows),
        "baseline": point.baseline,
        **values,
        "start": point.start,
        "settings": dict(point.settings),
    }
