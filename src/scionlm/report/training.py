"""The course of training: the mean held-out loss, one small chart a domain, and the numbers as a table."""

from collections.abc import Sequence

from scionlm.report.collect import Run, Trained
from scionlm.report.curves import Point, averaged, thinned
from scionlm.report.findings import known, mean_of
from scionlm.report.html import Content, Markup, RowGroup, card, join, name_of, section, table, tag
from scionlm.report.linechart import Chart, Reference, Series, bare_ends, line_chart, responsive_chart, value_range
from scionlm.report.svg import Caption
from scionlm.report.wording import NONE, exact, nats

# Enough to show every turn of a line at the width of a page.
_TRAIN_POINTS, _HELD_OUT_POINTS, _TABLE_ROWS = 300, 120, 30
_MAX_MULTIPLES = 16

_Line = Sequence[tuple[float, float]]


def curve_section(run: Run) -> Markup:
    """Return the loss curves, or a sentence where the run wrote none."""
    child, control = run.child.curves, run.control.curves if run.control else None
    if not (child.train or child.domains or (control and (control.train or control.domains))):
        phase = "training" if run.pruning is None else "the recovery"
        body: Content = tag("p", f"No losses were recorded during {phase} (metrics.jsonl is absent or empty).")
    else:
        body = [_main_figure(run), _multiples(run), _numbers(run)]
    title = "Loss over training" if run.pruning is None else "Loss over the recovery"
    return section("curves", title, body)


def _line(points: Sequence[Point]) -> _Line:
    return [(point.tokens, point.nll) for point in points]


def _models(run: Run) -> list[tuple[str, Trained]]:
    return [("child", run.child), *([("control", run.control)] if run.control else [])]


def _main_figure(run: Run) -> Markup:
    domains = run.child.curves.domains
    series: list[Series] = []
    for tone, model in _models(run):
        points = thinned(model.curves.mean, _HELD_OUT_POINTS)
        if points:
            series.append(Series(f"{tone}, held-out", _line(points), tone, end=f"{tone} {nats(points[-1].nll)}"))
    for tone, model in _models(run):
        if model.curves.train:
            points = averaged(model.curves.train, _TRAIN_POINTS)
            series.append(Series(f"{tone}, training", _line(points), tone, thin=True))
    source = known(run.source.losses) if run.source else {}
    references: list[Reference] = []
    mean = mean_of(source, domains)
    if mean is not None:
        references = [Reference("source, held-out", mean, "source", f"source {nats(mean)}")]
    x_label = "tokens trained on" if run.pruning is None else "tokens of the recovery"
    chart = Chart(series, references, x_label, "nats per token, lower is better")
    caption = Caption("loss", "Loss over the tokens trained on", _described(chart))
    return card(responsive_chart(caption, chart, (400, 330), bare_ends(chart)), _main_note(run))


def _described(chart: Chart) -> str:
    lines = [
        f"{one.name} goes from {nats(one.points[0][1])} to {nats(one.points[-1][1])} nats"
        for one in chart.series
        if one.points
    ]
    lines += [f"{one.name} is at {nats(one.value)} nats" for one in chart.references]
    return f"A line chart: {'; '.join(lines)}." if lines else "An empty chart."


def _main_note(run: Run) -> str:
    number_of = len(run.child.curves.domains)
    over = "of the one domain" if number_of == 1 else f"as the plain mean over {number_of} domains"
    held_out = f"Strong lines: held-out loss {over}." if number_of else "No held-out loss was measured yet."
    if number_of and not run.child.curves.mean:
        held_out = "No step has a held-out loss for every domain, so there is no mean to draw."
    length = len(run.child.curves.train)
    width = -(-length // _TRAIN_POINTS)
    drawn = f", drawn as means of {width} records each" if width > 1 else ""
    training = f" Faint lines: training loss{drawn}." if length else ""
    gaps = any(point.nll != point.nll for _, model in _models(run) for point in model.curves.train)
    return held_out + training + (" A gap in a line is a loss that was not finite." if gaps else "")


def _multiples(run: Run) -> Markup | None:
    """One small chart for each domain, all on the same scales so that they compare."""
    names = list(run.child.curves.domains)
    if len(names) < 2:
        return None
    charts = [_domain_chart(run, name) for name in names[:_MAX_MULTIPLES]]
    ranges = [span for chart in charts if (span := value_range(chart.series, chart.references))]
    span = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
    figures = []
    for k, (name, chart) in enumerate(zip(names, charts, strict=False)):
        same_scale = Chart(chart.series, chart.references, y_range=span, legend=False)
        caption = Caption(f"domain-{k}", "Held-out loss of one domain", _described(chart))
        drawn = line_chart(caption, 270, 190, same_scale)
        figures.append(card(drawn, title=name_of(name, 60)))
    note = "Held-out loss by domain in nats over tokens, all on the same scales."
    if any(chart.references for chart in charts):
        note += " The dashed line is the source."
    left_out = len(names) - len(charts)
    more = f" {left_out} more domains are in the tables." if left_out > 0 else ""
    return join(tag("p", note + more, class_="note"), tag("div", figures, class_="multiples"))


def _domain_chart(run: Run, name: str) -> Chart:
    series = []
    for tone, model in _models(run):
        points = thinned(model.curves.domains.get(name, ()), _HELD_OUT_POINTS)
        if points:
            series.append(Series(tone, _line(points), tone, end=nats(points[-1].nll)))
    source = known(run.source.losses).get(name) if run.source else None
    references = [Reference("source", source, "source", nats(source))] if source is not None else []
    return Chart(series, references)


def _numbers(run: Run) -> Markup | None:
    """The main chart as a table, for those who read rather than look."""
    models = [(tone, {point.step: point for point in model.curves.mean}) for tone, model in _models(run)]
    steps = sorted(set().union(*(points for _, points in models)))
    if not steps:
        return None
    every = [Point(step, next(p[step].tokens for _, p in models if step in p), 0.0) for step in steps]
    shown = thinned(every, _TABLE_ROWS)
    rows = [
        (
            f"{at.step:,}",
            exact(at.tokens),
            *(nats(p[at.step].nll, 3) if at.step in p else NONE for _, p in models),
        )
        for at in shown
    ]
    header = ("step", "tokens", *(tone for tone, _ in models))
    cut = f" ({len(shown)} of {len(steps)} evaluations)" if len(shown) < len(steps) else ""
    caption = f"Mean held-out loss in nats{cut}"
    inside = table("curve-numbers", caption, header, [RowGroup(None, rows)])
    return tag("details", tag("summary", "The numbers of this chart"), inside)
