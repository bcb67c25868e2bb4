"""How the weights of the domains moved: one small chart a domain, and the numbers as a table."""

import math
from collections.abc import Sequence

from scionlm.report.collect import Run
from scionlm.report.curves import Move
from scionlm.report.html import Markup, RowGroup, join, name_of, table, tag
from scionlm.report.linechart import Chart, Series, line_chart, value_range
from scionlm.report.svg import Caption
from scionlm.report.wording import NONE, exact, nats

_CHARTS, _ROWS = 16, 20


def weight_section(run: Run) -> Markup | None:
    """Return how the weights moved; None where they stayed."""
    moves = run.child.curves.moves
    if not moves:
        return None
    names = list(moves)
    charts = {name: _chart(moves[name]) for name in names[:_CHARTS]}
    ranges = [span for chart in charts.values() if (span := value_range(chart.series, ()))]
    span = (0.0, max(high for _, high in ranges)) if ranges else None
    figures = [
        tag(
            "figure",
            tag("h3", name_of(name, 60)),
            line_chart(
                Caption(
                    f"weight-{k}",
                    "Weight of one domain",
                    f"From {_percent(moves[name][0])} to {_percent(moves[name][-1])}.",
                ),
                270,
                190,
                Chart(chart.series, y_range=span, legend=False),
            ),
            class_="card",
        )
        for k, (name, chart) in enumerate(charts.items())
    ]
    note = (
        "The share of each domain in what is trained on, over tokens, all on the same scale. It follows the held-out "
        "loss of the domain beside its reference: the rule is in the settings below."
    )
    rows = [RowGroup(name_of(name), list(_rows(moves[name]))) for name in names]
    numbers = table("weights", "Weights and what moved them", ("step", "weight", "nats", "reference", "excess"), rows)
    body = join(tag("p", note, class_="note"), tag("div", figures, class_="multiples"), numbers)
    return tag("section", tag("h2", "Weights of the domains", id="moves"), body, aria_labelledby="moves")


def _chart(moves: Sequence[Move]) -> Chart:
    points = [(move.tokens, move.weight) for move in moves]
    return Chart([Series("weight", points, "child", end=_percent(moves[-1]))])


def _percent(move: Move) -> str:
    return f"{100 * move.weight:.1f} %" if math.isfinite(move.weight) else NONE


def _rows(moves: Sequence[Move]) -> list[tuple[str, ...]]:
    step = max(1, -(-len(moves) // _ROWS))
    kept = [*moves[::step], *([moves[-1]] if (len(moves) - 1) % step else [])]
    return [
        (exact(move.step), _percent(move), _nats(move.nll), _nats(move.reference), _nats(move.nll - move.reference))
        for move in kept
    ]


def _nats(value: float) -> str:
    return nats(value, 3) if math.isfinite(value) else NONE
