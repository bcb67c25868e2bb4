"""How the weights of the domains moved: one small chart a domain, and the numbers as a table."""

import math
from collections.abc import Mapping, Sequence

from scionlm.report.collect import Run
from scionlm.report.curves import Move
from scionlm.report.html import Markup, RowGroup, join, name_of, section, table, tag
from scionlm.report.linechart import Chart, Series, line_chart, value_range
from scionlm.report.svg import Caption
from scionlm.report.wording import NONE, exact, nats

_CHARTS, _ROWS = 16, 20


def weight_section(run: Run) -> Markup | None:
    """Return how the weights moved in each phase; None where they stayed."""
    phases = [(name, course.moves) for name, course in run.phases if course.moves]
    if not phases:
        return None
    note = (
        "The share of each domain in the new text, over tokens, all on the same scale. It follows the held-out "
        "loss of the domain beside its reference: the rule is in the settings below."
    )
    body = join(tag("p", note, class_="note"), *(_phase(k, name, moves) for k, (name, moves) in enumerate(phases)))
    return section("moves", "Weights of the domains", body)


def _phase(number: int, name: str, moves: Mapping[str, Sequence[Move]]) -> Markup:
    lines = {domain: [(move.tokens, move.weight) for move in each] for domain, each in moves.items()}
    rows = [RowGroup(name_of(domain), list(_rows(moves[domain]))) for domain in moves]
    mark = f"-{number}" if number else ""
    header = ("step", "weight", "nats", "reference", "excess")
    numbers = table(f"weights{mark}", "Weights and what moved them", header, rows)
    title = tag("h3", name, class_="sub") if name else None
    return join(title, share_charts(f"weight{mark}", "Weight of one domain", lines), numbers)


def share_charts(
    ident: str, title: str, lines: Mapping[str, Sequence[tuple[float, float]]], events: Sequence[float] = ()
) -> Markup:
    """Return a small chart of each domain's share over tokens, all on the same scale; of many domains the first ones.

    Args:
        ident: What the names of the drawings begin with.
        title: Of each drawing.
        lines: By domain, points of tokens and share.
        events: Places that an upright line marks.
    """
    shown = {name: points for name, points in list(lines.items())[:_CHARTS] if points}
    series = {
        name: [Series("share", points, "child", end=share_words(points[-1][1]))] for name, points in shown.items()
    }
    ranges = [span for one in series.values() if (span := value_range(one, ()))]
    span = (0.0, max(high for _, high in ranges)) if ranges else None
    figures = [
        tag(
            "figure",
            tag("h3", name_of(name, 60)),
            line_chart(
                Caption(f"{ident}-{k}", title, f"From {share_words(points[0][1])} to {share_words(points[-1][1])}."),
                270,
                190,
                Chart(series[name], y_range=span, legend=False, events=events),
            ),
            class_="card",
        )
        for k, (name, points) in enumerate(shown.items())
    ]
    return tag("div", figures, class_="multiples")


def share_words(share: float) -> str:
    """Return a share in percent, with a tenth."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else NONE


def _rows(moves: Sequence[Move]) -> list[tuple[str, ...]]:
    step = max(1, -(-len(moves) // _ROWS))
    kept = [*moves[::step], *([moves[-1]] if (len(moves) - 1) % step else [])]
    return [
        (
            exact(move.step),
            share_words(move.weight),
            _nats(move.nll),
            _nats(move.reference),
            _nats(move.nll - move.reference),
        )
        for move in kept
    ]


def _nats(value: float) -> str:
    return nats(value, 3) if math.isfinite(value) else NONE
