"""The section of a comparison on what its runs learned and forgot: the drawing, and each point in numbers."""

from collections.abc import Sequence

from scionlm.report.compare_frontier import Frontier, Point, Value
from scionlm.report.compare_frontier_plot import frontier_chart
from scionlm.report.html import Content, Markup, RowGroup, card, join, name_of, section, table, tag
from scionlm.report.wording import NONE, nats, signed

_MAX_NAMES, _MAX_ROWS = 6, 100


def frontier_section(frontier: Frontier | None) -> Markup | None:
    """Return what was learned against what was forgotten; None where no run continues a model."""
    if frontier is None:
        return None
    picture, away = frontier_chart(frontier)
    note = (
        "Both axes count from where a run began: up is learned, right is forgotten, so the upper left is best. Dotted "
        "lines join what has the same net, learned less forgotten. Numbers are those of the table; a point that is "
        "too close to others has none."
    )
    figure = card(picture, note + away)
    body = join(tag("p", _measured(frontier)), figure, _table(frontier), tag("p", _rule(frontier), class_="note"))
    title = "What each learned, and what it forgot"
    return section("frontier", title, body)


def _measured(frontier: Frontier) -> list[Content]:
    """Return what is old and what is new text, and where the runs began."""
    field = frontier.field
    said: list[Content] = ["Upstream, what was known before, is the mean over ", _listed(field.upstream)]
    said += ["; downstream, the new text, that over ", _listed(field.downstream), ". "]
    for k, start in enumerate(field.starts[:_MAX_NAMES]):
        began = f" began at {nats(start.upstream, 3)} nats upstream and {nats(start.downstream, 3)} downstream"
        said += ["; " if k else "", name_of(start.name, 60), began]
    several = len(field.starts) > 1
    if any("branch" in point.settings for point in frontier.candidates):
        branches = ". One that branches off a checkpoint counts from the finished source too, so that all compare"
        said.append(branches)
    own = ". Each is measured from its own source, a baseline without one from the first. "
    return [*said, own if several else "."]


def _listed(names: Sequence[str]) -> list[Content]:
    shown: list[Content] = [[", " if k else "", name_of(name, 40)] for k, name in enumerate(names[:_MAX_NAMES])]
    return [*shown, f" and {len(names) - _MAX_NAMES} more"] if len(names) > _MAX_NAMES else shown


def _rule(frontier: Frontier) -> str:
    return (
        "On the frontier is what no other run, nor the start, beats on both sides. Recommended is the largest net; "
        "where the standard deviations of two together are larger than their difference, the one that forgets less. A "
        "net weighs a nat of old text like a nat of new; who minds one more reads the drawing. Baselines did not "
        "continue a model; they are measured from the same start, and are not recommended."
    )


def _table(frontier: Frontier) -> Markup:
    every = frontier.points[:_MAX_ROWS]
    rows: list[list[Content]] = []
    for k, point in enumerate(every, 1):
        settings = [name_of(point.settings.get(key, NONE), 40) for key in frontier.differing]
        values = [_shown(value) for value in (point.forgetting, point.adaptation, point.net)]
        rows.append([_title(k, point, frontier), *values, *settings])
    header = ["", "forgets", "gains", "net", *(key.replace("-", "\u2011") for key in frontier.differing)]
    more = f"; {len(frontier.points) - _MAX_ROWS} more are in compare.json" if len(frontier.points) > _MAX_ROWS else ""
    seeds = sorted({len(point.rows) for point in frontier.points if len(point.rows) > 1})
    spread = f"; \u00b1 one standard deviation of {' or '.join(map(str, seeds[:4]))} seeds" if seeds else ""
    caption = f"In nats per token against the start, the largest net first{spread}{more}"
    return tag("div", table("frontier-table", caption, header, [RowGroup(None, rows)]), class_="tight")


def _title(number: int, point: Point, frontier: Frontier) -> Markup:
    chosen = point is frontier.recommended
    name = tag("b", name_of(point.name, 60), class_="child") if chosen else name_of(point.name, 60)
    notes = ["recommended"] if chosen else ["baseline"] if point.baseline else []
    said = tag("span", f" {', '.join(notes)}", class_="soft") if notes else None
    return join(tag("span", f"{number}\u2002", class_="soft"), name, said)


def _shown(value: Value) -> str:
    return signed(value.mean) + (f" \u00b1 {nats(value.std, 3)}" if value.std is not None else "")
