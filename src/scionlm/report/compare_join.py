"""Join rows into a comparison: what compares with what, the share of the gap that each closes, seeds as one.

share = (control - run) / (control - source)      all three the plain mean over the domains that they share
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scionlm.report.compare_frontier import (
    Balance,
    Frontier,
    balance_of,
    balance_record,
    field_of,
    frontier_of,
    frontier_record,
)
from scionlm.report.compare_read import Base, Row, Setup
from scionlm.report.compare_tasks import TaskComparison, compared_tasks, tasks_record
from scionlm.report.findings import gap_closed, mean_of


@dataclass(frozen=True)
class Judged:
    """A row with what the comparison makes of it.

    Attributes:
        row: The row.
        mean: Mean loss over its domains, in nats; None where there is none.
        reason: Why its losses do not compare with the others'; None where they do.
        source: The model that it descends from, as far as its losses are known.
        gap: Share of the gap between control and source that it closes.
        balance: What it learned and forgot; None where it is not known what it knew.
    """

    row: Row
    mean: float | None
    reason: str | None
    source: Base | None
    gap: float | None
    balance: Balance | None = None

    @property
    def ranked(self) -> bool:
        """Whether its mean is final and compares with the others'."""
        return self.row.done and self.reason is None and self.mean is not None


@dataclass(frozen=True)
class Behind:
    """By how much runs are worse than the best, each beside that of its own seed: the same text in the same order.

    Attributes:
        mean: Mean difference, in nats.
        std: Its standard deviation over seeds.
        seeds: Seeds that both have, two at least.
        worse: Those of them in which it is worse.
    """

    mean: float
    std: float
    seeds: int
    worse: int


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone, one or more; finished ones that compare.

    Attributes:
        name: Of all of them.
        members: By seed.
        mean: Mean of their means, in nats.
        std: Standard deviation of their means; None with one seed.
        gap: Mean share of the gap closed.
        best: Whether its mean is the lowest.
        behind: How far it is behind the best; None for the best, and where they have no two seeds in common.
    """

    name: str
    members: Sequence[Judged]
    mean: float
    std: float | None
    gap: float | None
    best: bool = False
    behind: Behind | None = None

    @property
    def first(self) -> Row:
        """One of its rows."""
        return self.members[0].row


@dataclass(frozen=True)
class Comparison:
    """Everything that is drawn.

    Attributes:
        rows: All rows: those that compare by mean loss, then the others.
        groups: By mean loss.
        sources: The models that they descend from, the most common first.
        setup: How the losses that compare were measured.
        domains: Their domains, in order.
        frontier: What runs that continue a model learned and forgot; None where there are none.
        tasks: Their scores on tasks; None where there are none.
    """

    rows: Sequence[Judged]
    groups: Sequence[Group]
    sources: Sequence[Base]
    setup: Setup
    domains: Sequence[str]
    frontier: Frontier | None = None
    tasks: TaskComparison | None = None


def usual_setup(rows: Iterable[Row]) -> Setup:
    """Return how most of the rows were measured; finished ones decide where there are any, the first in a tie."""
    known = [row for row in rows if row.losses]
    setups = [row.setup for row in known if row.done] or [row.setup for row in known]
    return Counter(setups).most_common(1)[0][0] if setups else Setup()


def join(rows: Sequence[Row]) -> Comparison:
    """Return the comparison of rows."""
    setup = usual_setup(rows)
    # One whose loss was not finite in a domain knows it all the same; the others show that it is there.
    fullest = max((row for row in rows if row.setup == setup), key=lambda row: len(row.losses), default=None)
    domains = list(fullest.losses) if fullest else []
    judged = [_judge(row, rows, setup) for row in rows]
    comparable = [one.row for one in judged if one.reason is None]
    field = field_of(comparable, domains)
    judged = [
        replace(one, gap=_gap(one, judged), balance=balance_of(one.row, field) if one.reason is None else None)
        for one in judged
    ]
    ordered = sorted(judged, key=lambda one: (one.reason is not None, one.mean is None, one.mean or 0.0))
    sources = Counter(one.source.key for one in ordered if one.source and one.reason is None)
    by_key = {one.source.key: one.source for one in reversed(ordered) if one.source and one.reason is None}
    # Not by loss: of two runs of one seed the better would always come into the same group.
    groups = _groups([one for one in judged if one.ranked])
    members = [(group.name, [one.row for one in group.members]) for group in groups]
    return Comparison(
        rows=ordered,
        groups=groups,
        sources=[by_key[key] for key, _ in sources.most_common()],
        setup=setup,
        domains=domains,
        frontier=frontier_of(members, field, comparable),
        tasks=compared_tasks(_scored(ordered)),
    )


def _scored(ordered: Sequence[Judged]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return name, kind and scores of every row, the sources first, each once."""
    sources = {
        one.source.key: (one.source.name, "source", one.row.source_scores)
        for one in reversed(ordered)
        if one.source is not None and one.row.base == one.source and one.row.source_scores.get("tasks")
    }
    rows = [(one.row.name, "control" if one.row.is_control else one.row.kind, one.row.scores) for one in ordered]
    return [*sources.values(), *rows]


def _judge(row: Row, rows: Sequence[Row], setup: Setup) -> Judged:
    mean = mean_of(row.losses, sorted(row.setup.domains))  # a domain that lacks would make it another mean
    reason = row.setup.difference(setup) if row.losses else None
    return Judged(row, mean, reason, _first_source(row, rows), None)


def _first_source(row: Row, rows: Sequence[Row]) -> Base | None:
    """Return the source; where that is the result of another row, the one that that row descends from."""
    at, seen = row, {row.name}
    while at.source_path is not None:
        model = at.source_path
        parent = next((one for one in rows if one.kind == "run" and _is_result(model, one)), None)
        if parent is None or parent.name in seen or parent.setup.difference(row.setup) is not None:
            break
        at = parent
        seen.add(at.name)
    return at.base


def _is_result(model: str, row: Row) -> bool:
    return model.endswith("model") and Path(model).resolve() == (row.folder / "model").resolve()


def _gap(one: Judged, judged: Sequence[Judged]) -> float | None:
    row, source = one.row, one.source
    if not one.ranked or row.kind != "run" or row.is_control or source is None:
        return None
    losses = [other.row.losses for other in _controls(one, judged)]
    shared = [name for name in row.losses if name in source.losses and all(name in each for each in losses)]
    means = [mean for each in losses if (mean := mean_of(each, shared)) is not None]
    if not means:
        return None
    return gap_closed(mean_of(row.losses, shared), statistics.fmean(means), mean_of(source.losses, shared))


def _controls(one: Judged, judged: Sequence[Judged]) -> list[Judged]:
    """Return the control of a run: its own, else one of the same shape, tokens and seed, else those of other seeds."""
    row = one.row
    sound = [o for o in judged if o.row.is_control and o.row.done and o.row.losses and o.reason is None]
    own = [other for other in sound if row.folder in other.row.control_of]
    alike = [o for o in sound if row.shape and dict(o.row.shape) == dict(row.shape) and o.row.tokens == row.tokens]
    return own or [other for other in alike if other.row.seed == row.seed][:1] or alike


def _groups(judged: Sequence[Judged]) -> list[Group]:
    found: list[list[Judged]] = []
    for one in judged:
        # Two of the same seed are not two measurements.
        free = (
            group
            for group in found
            if group[0].row.signature == one.row.signature and one.row.seed not in [each.row.seed for each in group]
        )
        group = next(free, None)
        if group is None:
            found.append([one])
        else:
            group.append(one)
    groups = _named(sorted((_group(members) for members in found), key=lambda group: group.mean))
    trained = [group for group in groups if group.first.kind != "model"] or groups
    return [replace(group, best=group is trained[0], behind=_behind(group, trained[0])) for group in groups]


def _named(groups: Sequence[Group]) -> list[Group]:
    """Return groups with names of their own: runs of other settings may have the same."""
    seen: Counter[str] = Counter()
    found: list[Group] = []
    for group in groups:
        seen[group.name] += 1
        found.append(replace(group, name=f"{group.name} ({seen[group.name]})") if seen[group.name] > 1 else group)
    return found


def _behind(group: Group, best: Group) -> Behind | None:
    theirs = {one.row.seed: one.mean for one in best.members}
    pairs = [(one.mean, theirs.get(one.row.seed)) for one in group.members if one.row.seed is not None]
    apart = [mine - other for mine, other in pairs if mine is not None and other is not None]
    if group is best or len(apart) < 2:
        return None
    return Behind(statistics.fmean(apart), statistics.stdev(apart), len(apart), sum(each > 0 for each in apart))


def _group(members: list[Judged]) -> Group:
    members = sorted(members, key=lambda one: one.row.seed or 0)
    means = [one.mean for one in members if one.mean is not None]
    gaps = [one.gap for one in members if one.gap is not None]
    bases = list(dict.fromkeys(_base_name(one.row) for one in members))
    if len(members) == 1:
        bases = [members[0].row.name]
    return Group(
        name=", ".join(bases),
        members=members,
        mean=statistics.fmean(means),
        std=statistics.stdev(means) if len(means) > 1 else None,
        gap=statistics.fmean(gaps) if len(gaps) == len(members) else None,
    )


def _base_name(row: Row) -> str:
    ending = "/control" if row.kind == "control" else ""
    return replace(row, name=row.name.removesuffix(ending)).base_name + ending


def to_record(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as compare.json holds it."""
    sources = [_base_record(base, comparison) for base in comparison.sources]
    owners = {one.row.name: group.name for group in comparison.groups for one in group.members}
    return {
        "domains": list(comparison.domains),
        "num_tokens_by_domain": dict(comparison.setup.num_tokens or ()),
        "seq_len": comparison.setup.seq_len,
        "data_fingerprint": comparison.setup.data,
        "source": sources[0] if sources else None,
        "sources": sources,
        "frontier": frontier_record(comparison.frontier),
        "tasks": tasks_record(comparison.tasks),
        "rows": [_row_record(one, owners.get(one.row.name)) for one in comparison.rows],
        "groups": [_group_record(group) for group in comparison.groups],
    }


def _base_record(base: Base, comparison: Comparison) -> dict[str, Any]:
    field = comparison.frontier.field if comparison.frontier else None
    return {
        "name": base.name,
        "num_hidden_layers": base.num_layers,
        "num_parameters": _whole(base.num_parameters),
        "domains": dict(base.losses),
        "mean": mean_of(base.losses, comparison.domains),
        "upstream": mean_of(base.losses, field.upstream) if field else None,
        "downstream": mean_of(base.losses, field.downstream) if field else None,
    }


def _row_record(one: Judged, group: str | None) -> dict[str, Any]:
    row = one.row
    return {
        "name": row.name,
        "kind": row.kind,
        "group": group,
        "state": row.state,
        "seed": row.seed,
        "init": row.init,
        "num_parameters": _whole(row.num_parameters),
        "num_hidden_layers": row.num_layers,
        "tokens": _whole(row.tokens),
        "flops": row.flops,
        "seconds": row.seconds,
        "device_hours": None if row.seconds is None else row.seconds * row.devices / 3600,
        "pruning": {"method": row.pruned, "tokens": _whole(row.pruning_tokens)} if row.pruned else None,
        "domains": dict(row.losses),
        "mean": one.mean,
        "gap_closed": one.gap,
        **balance_record(one.balance),
        "not_comparable": one.reason,
        "source": one.source.name if one.source else None,
        "folder": str(row.folder),
    }


def _group_record(group: Group) -> dict[str, Any]:
    domains = group.first.losses
    return {
        "name": group.name,
        "kind": group.first.kind,
        "rows": [one.row.name for one in group.members],
        "seeds": [one.row.seed for one in group.members],
        "n": len(group.members),
        "mean": group.mean,
        "std": group.std,
        "domains": {name: statistics.fmean(one.row.losses[name] for one in group.members) for name in domains},
        "gap_closed": group.gap,
        "best": group.best,
        "behind_best": asdict(group.behind) if group.behind else None,
    }


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and math.isfinite(value) else None
