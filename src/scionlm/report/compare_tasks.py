"""Tasks in a comparison: every model's scores, and how far each is from the best one, item by item."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.core.records import stderr_key
from scionlm.evaluation.paired_scores import paired_scores
from scionlm.report.values import mapping, number, text

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A model's score on a task, between 0 and 1 where it is an accuracy, with its standard error over items."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Apart:
    """How far a model's mean over tasks is from another's, item by item, with the ends of its interval."""

    mean: float
    low: float | None
    high: float | None
    num_tasks: int


@dataclass(frozen=True)
class Scored:
    """A model with scores.

    Attributes:
        name: Its row's.
        kind: source, run, control or model.
        scores: By task.
        mean: Over the accuracies that all models have; None where it lacks one, and where its items are others.
        is_alike: Whether it was asked the items that most of them were.
        apart: From the best run, or of one, of the best of all; None of that one itself, and where items differ.
        suites: What its evaluation says of suites, by name.
        inference: What `scion evaluate --speed` says.
    """

    name: str
    kind: str
    scores: Mapping[str, Score]
    mean: float | None
    is_alike: bool
    apart: Apart | None
    suites: Mapping[str, Any]
    inference: Mapping[str, Any]


@dataclass(frozen=True)
class TaskComparison:
    """The scores of all models.

    Attributes:
        models: In the order of the rows.
        tasks: In the order of the first model's, each with the metric it is shown by.
        lower: Those of which a lower score is better.
        chance: By task, where it is known.
        against: Name of the model that the others are set against; None where there is none.
    """

    models: Sequence[Scored]
    tasks: Mapping[str, str]
    lower: frozenset[str]
    chance: Mapping[str, float]
    against: str | None


def compared_tasks(records: Sequence[tuple[str, str, Mapping[str, Any]]]) -> TaskComparison | None:
    """Return the comparison of scores; None where there are none.

    Args:
        records: Name, kind, and record of each model: `tasks`, `items`, `suites`, `inference`, as far as there are any.
    """
    known = [(name, kind, one) for name, kind, one in records if mapping(one.get("tasks")) or one.get("inference")]
    if not known:
        return None
    tasks: dict[str, str] = {}
    lower: set[str] = set()
    chance: dict[str, float] = {}
    for _, _, one in known:
        for task, record in mapping(one.get("tasks")).items():
            found = mapping(record)
            if text(found, "group"):  # the group stands for it
                continue
            metric = tasks.setdefault(task, text(found, "metric") or "acc")
            if mapping(found.get("higher_is_better")).get(metric) is False:
                lower.add(task)
            if (share := number(found, "chance")) is not None:
                chance[task] = share
    scores = [_scores(mapping(one.get("tasks")), tasks) for _, _, one in known]
    # What may win decides which tasks count: a source may have been asked others than its children.
    judged = [each for each, (_, kind, _) in zip(scores, known, strict=True) if each and kind != "source"] or scores
    shared = [task for task in tasks if all(task in each for each in judged if each)]
    # What is no share of items has another scale, and may be better where it is lower: it has a column, and no vote.
    voting = [t for t in shared if t not in lower and all(0 <= each[t].value <= 1 for each in scores if t in each)]
    alike = _alike([mapping(one.get("items")) for _, _, one in known], voting)
    means = [
        sum(each[t].value for t in voting) / len(voting) if voting and same and set(voting) <= each.keys() else None
        for each, same in zip(scores, alike, strict=True)
    ]
    ranked = [k for k, mean in enumerate(means) if mean is not None]
    runs = [k for k in ranked if known[k][1] == "run"] or ranked
    best = max(runs, key=lambda k: means[k] or 0.0, default=None)
    items = [mapping(one.get("items")) for _, _, one in known]
    models = [
        Scored(
            name,
            kind,
            scores[k],
            means[k],
            alike[k],
            None if best in (k, None) else _apart(items[k], items[best], voting),
            {**mapping(mapping(one.get("tasks_with")).get("suites")), **mapping(one.get("suites"))},
            mapping(one.get("inference")),
        )
        for k, (name, kind, one) in enumerate(known)
    ]
    against = None if best is None else known[best][0]
    return TaskComparison(models, tasks, frozenset(lower), chance, against)


def _alike(items: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[bool]:
    """Return whether each model was asked what most of them were, as far as it says."""
    asked = [[text(mapping(one.get(task)), "sha256") for task in tasks] for one in items]
    said = Counter(tuple(one) for one in asked if None not in one)
    most = said.most_common(1)[0][0] if said else ()
    return [None in one or tuple(one) == most for one in asked]


def _scores(records: Mapping[str, Any], tasks: Mapping[str, str]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for task, metric in tasks.items():
        record = mapping(records.get(task))
        value = number(record, metric)
        if value is not None and math.isfinite(value):
            found[task] = Score(value, number(record, stderr_key(metric)))
    return found


def _apart(mine: Mapping[str, Any], theirs: Mapping[str, Any], tasks: Sequence[str]) -> Apart | None:
    """Return the mean of the paired differences over tasks; None where a task's items are not the same."""
    gaps: list[float] = []
    variance = 0.0
    for task in tasks:
        try:
            found = paired_scores(dict(mapping(mine[task])), dict(mapping(theirs[task])))
        except (KeyError, UsageError):
            return None
        gaps.append(found.difference)
        variance += math.inf if found.stderr is None else found.stderr**2
    if not gaps:
        return None
    mean = sum(gaps) / len(gaps)
    if math.isinf(variance):
        return Apart(mean, None, None, len(gaps))
    half = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2) * math.sqrt(variance) / len(gaps)
    return Apart(mean, mean - half, mean + half, len(gaps))


def tasks_record(found: TaskComparison | None) -> dict[str, Any] | None:
    """Return what compare.json holds of it."""
    if found is None:
        return None
    return {
        "against": found.against,
        "confidence": _CONFIDENCE,
        "metrics": dict(found.tasks),
        "lower_is_better": sorted(found.lower),
        "chance": dict(found.chance),
        "models": [
            {
                "name": one.name,
                "kind": one.kind,
                "scores": {task: {"value": s.value, "stderr": s.stderr} for task, s in one.scores.items()},
                "mean": one.mean,
                "difference": None if one.apart is None else one.apart.__dict__,
                "inference": dict(one.inference) or None,
            }
            for one in found.models
        ],
    }
