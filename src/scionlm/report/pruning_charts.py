"""The course of pruning as charts: how many units the masks leave open beside the target, and the losses meanwhile."""

from collections.abc import Mapping, Sequence

from scionlm.core.duration import Duration
from scionlm.report.collect import Pruning, Run, losses_in
from scionlm.report.curves import Curves, Point, averaged, thinned
from scionlm.report.findings import known, mean_of
from scionlm.report.html import Markup, card, join, name_of, tag
from scionlm.report.linechart import Chart, Reference, Series, line_chart, responsive_chart
from scionlm.report.pruning_read import AXES, axes_of
from scionlm.report.svg import Caption
from scionlm.report.values import mapping, number
from scionlm.report.wording import exact, nats

_POINTS, _HELD_OUT_POINTS, _MAX_AXES = 200, 120, 12
_LOW, _HIGH = -0.05, 1.05  # what is no share is not drawn


def finish_of(pruning: Pruning) -> int | None:
    """Return the step from which masks are hard, that of the end where there is none; None where it is not known."""
    training, settings = mapping(pruning.record.get("training")), mapping(pruning.record.get("settings"))
    steps, tokens, finish = number(training, "steps"), number(training, "tokens"), settings.get("finish")
    if not steps or not tokens or not isinstance(finish, int | float | str):
        return None
    try:
        found = round(steps) - Duration.parse(finish).in_steps(round(steps), round(tokens / steps))
    except (ValueError, OverflowError):
        return None
    return found if 0 <= found <= steps else None


def course_figure(pruning: Pruning) -> Markup | None:
    """Return a small chart an axis: the share of units that masks leave open, beside the share asked for."""
    gates = pruning.stretches[0].gates if pruning.stretches else {}
    names = [name for name in (*AXES, *gates) if gates.get(name, {}).get("open_share")]
    names = list(dict.fromkeys(names))[:_MAX_AXES]
    if not names:
        return None
    finish = finish_of(pruning)
    targets = {axis.name: f"{exact(axis.target)} of {exact(axis.units)} stay" for axis in axes_of(pruning.record)}
    figures = [
        tag(
            "figure",
            tag("h3", _title(name)),
            tag("p", targets[name], class_="soft") if name in targets else None,
            line_chart(_caption(k, name, gates[name]), 200, 160, _chart(gates[name], finish)),
            class_="card",
        )
        for k, name in enumerate(names)
    ]
    note = (
        "In % of the units, over the steps of pruning. Strong: units that the masks leave open on average. Dashed: the "
        "target, which falls from all units to those that are to stay."
    )
    steps = number(mapping(pruning.record.get("training")), "steps")
    if finish is not None and steps and finish < steps:
        note += f" Behind the upright line, from step {exact(finish)} on, masks are hard and no longer move."
    return join(tag("p", note, class_="note"), tag("div", figures, class_="multiples maps"))


def _title(name: str) -> Markup:
    words = AXES.get(name)
    return tag("span", words[:1].upper() + words[1:]) if words else name_of(name, 40)


def _percent(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(float(point.step), 100 * point.nll) for point in thinned(points, _POINTS) if _LOW <= point.nll <= _HIGH]


def _chart(course: Mapping[str, Sequence[Point]], finish: int | None) -> Chart:
    reached, target = _percent(course["open_share"]), _percent(course.get("target_share", ()))
    series = [Series("target", target, "plain dashed", end=_end(target), marked=False)] if target else []
    series.append(Series("open", reached, "child", end=_end(reached), marked=False))
    return Chart(series, y_range=(0.0, 100.0), legend=False, events=() if finish is None else (float(finish),))


def _end(points: Sequence[tuple[float, float]]) -> str:
    return f"{points[-1][1]:.0f}%" if points else ""


def _caption(k: int, name: str, course: Mapping[str, Sequence[Point]]) -> Caption:
    ends = [f"{what.partition('_')[0]} {_end(_percent(points)) or '?'}" for what, points in course.items() if points]
    return Caption(f"prune-axis-{k}", f"Open share of {AXES.get(name, 'units')}", f"At the end: {', '.join(ends)}.")


def loss_figure(run: Run, pruning: Pruning) -> Markup | None:
    """Return the losses while pruning, one stretch of training behind the other, beside the source's."""
    train, mean = _joined([one.train for one in pruning.stretches], pruning.stretches), _means(pruning)
    if not train and not mean:
        return None
    names = sorted(pruning.stretches[-1].domains)
    source = mean_of(known(run.source.losses) if run.source else {}, names)
    left = mean_of(known(losses_in(pruning.record.get("domains"))), names)
    references = [
        Reference("source", source, "source", f"source {nats(source)}") if source is not None else None,
        Reference("right after pruning", left, "plain", f"pruned {nats(left)}") if left is not None else None,
    ]
    series = [Series("held-out", thinned_line(mean), "child")] if mean else []
    series += [Series("training", [(p.tokens, p.nll) for p in averaged(train, _POINTS)], "child", thin=True)]
    chart = Chart(
        [one for one in series if one.points],
        [one for one in references if one],
        "tokens while pruning",
        "nats per token, lower is better",
    )
    described = "; ".join(f"{one.name}: {nats(one.points[0][1])} to {nats(one.points[-1][1])}" for one in chart.series)
    caption = Caption("prune-loss", "Losses while pruning", f"{described} nats.")
    by_masks = any(one.gates for one in pruning.stretches)
    note = "Training loss, and held-out loss as the plain mean over domains."
    if by_masks:
        note = (
            "Faint: training loss, under masks that are drawn anew in every pass. Points: held-out loss, with as many "
            "of the likeliest units open as are open on average."
        )
    return card(responsive_chart(caption, chart), note, "Losses while pruning")


def thinned_line(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return points to draw, tokens and loss, few enough to tell apart."""
    return [(point.tokens, point.nll) for point in thinned(points, _HELD_OUT_POINTS)]


def _means(pruning: Pruning) -> list[Point]:
    """Return the held-out means on the way, and under the last masks, which are measured at the end."""
    stretches = pruning.stretches
    found = _joined([one.mean for one in stretches], stretches)
    names = sorted(stretches[-1].domains) if stretches else []
    last = mean_of(known(losses_in(pruning.record.get("masked"))), names)
    if last is not None and found and found[-1].tokens < pruning.tokens:
        found.append(Point(found[-1].step + 1, pruning.tokens, last))
    return found


def _joined(lines: Sequence[Sequence[Point]], stretches: Sequence[Curves]) -> list[Point]:
    """Return the lines of stretches as one: each counts from where the one before ended."""
    found: list[Point] = []
    step, tokens = 0, 0.0
    for line, stretch in zip(lines, stretches, strict=True):
        found += [Point(step + point.step, tokens + point.tokens, point.nll) for point in line]
        step, tokens = step + (stretch.last_step or 0), tokens + (stretch.last_tokens or 0.0)
    return found
