"""The scores on tasks: source, child and control side by side, each with its standard error."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scionlm.core.records import stderr_key
from scionlm.report.html import Content, Markup, RowGroup, card, clip, name_of, table, tag
from scionlm.report.svg import Caption, box, drawing, label, line, responsive
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import exact

_MAX_TASKS = 40  # on a page; all are in result.json
_ROW, _GAP, _TOP = 12, 14, 22
_NAMES = 170  # room for the names of tasks
_TONES = ("source", "child", "control")


@dataclass(frozen=True)
class TaskScores:
    """Records of tasks by name, of each model."""

    source: Mapping[str, Any] = field(default_factory=dict)
    child: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)


def read_tasks(scores: Mapping[str, Mapping[str, Any]]) -> TaskScores:
    """Return what records of source, child and control say of tasks; the single ones of a group are in the group's."""
    every = [mapping(scores.get(name, {}).get("tasks")) for name in _TONES]
    return TaskScores(*({name: one for name, one in each.items() if not text(mapping(one), "group")} for each in every))


def task_section(scores: TaskScores) -> Markup | None:
    """Return a table and a picture of the scores on tasks; None where there are none."""
    if not scores.child:
        return None
    shown = list(scores.child)[:_MAX_TASKS]
    groups = [RowGroup(name_of(name), list(_rows(scores, name))) for name in shown]
    header = ("", "metric", "score", "standard error", "chance", "items")
    left_out = len(scores.child) - len(shown)
    note = (
        "A standard error is over items: scores less than two of them apart may be the same. Models are compared item "
        "by item in scion compare, which is surer. Where a line crosses the bars, it is what guessing comes to."
    )
    more = f" {left_out} more tasks are in result.json." if left_out else ""
    return tag(
        "section",
        tag("h2", "Tasks", id="tasks"),
        tag("p", note + more, class_="note"),
        _picture(scores, shown),
        table("task-table", "Scores on tasks", header, groups),
        aria_labelledby="tasks",
    )


def _models(scores: TaskScores, name: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for tone in _TONES:
        record = mapping(getattr(scores, tone).get(name))
        if record:
            yield tone, record


def _score(scores: TaskScores, name: str, record: Mapping[str, Any]) -> tuple[str, float | None, float | None]:
    """Return the metric that a task is shown by, a model's value and its standard error."""
    metric = text(mapping(scores.child.get(name)), "metric") or "acc"
    return metric, number(record, metric), number(record, stderr_key(metric))


def _rows(scores: TaskScores, name: str) -> Iterable[tuple[Content, ...]]:
    for tone, record in _models(scores, name):
        metric, value, error = _score(scores, name, record)
        chance, items = number(record, "chance"), number(record, "num_items")
        yield (
            tag("b", tone, class_=tone),
            name_of(metric, 40),
            _figure(value),
            _figure(error),
            _figure(chance),
            exact(items) if items is not None else None,
        )


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _picture(scores: TaskScores, names: list[str]) -> Markup | None:
    """Return bars from 0 to 1 with their standard errors, of the tasks whose scores lie there."""
    drawn = [
        name for name in names if all(0 <= (_score(scores, name, r)[1] or 0) <= 1 for _, r in _models(scores, name))
    ]
    words = "; ".join(
        f"{clip(name, 60)}: "
        + ", ".join(f"{tone} {_figure(_score(scores, name, r)[1])}" for tone, r in _models(scores, name))
        for name in drawn
    )
    if not drawn:
        return None
    caption = Caption("task-scores", "Scores on tasks, with standard errors", words)
    return card(responsive(caption, lambda named, width: _bars(named, width, scores, drawn)))


def _bars(caption: Caption, width: int, scores: TaskScores, names: list[str]) -> Markup:
    left = min(_NAMES, width // 3)
    room = width - left - 48

    def place(value: float) -> float:
        return left + room * min(max(value, 0.0), 1.0)

    parts: list[Content] = []
    y = float(_TOP)
    for name in names:
        models = list(_models(scores, name))
        parts.append(label(0, y + _ROW * len(models) / 2 + 4, clip(name, 26), "small"))
        for number_of, (tone, record) in enumerate(models):
            _, value, error = _score(scores, name, record)
            top = y + number_of * _ROW
            if value is None:
                continue
            parts.append(box(left, top, place(value) - left, _ROW - 3, f"fill {tone}", 2))
            if error is not None:
                middle = top + (_ROW - 3) / 2
                parts.append(line(place(value - error), middle, place(value + error), middle, "axis"))
            parts.append(label(place(value + (error or 0)) + 4, top + _ROW - 4, f"{value:.2f}", "small"))
        chance = number(models[0][1], "chance") if models else None
        if chance:
            parts.append(line(place(chance), y - 3, place(chance), y + len(models) * _ROW, "grid"))
        y += len(models) * _ROW + _GAP
    return drawing(caption, width, int(y), parts)
