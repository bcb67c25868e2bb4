"""The section on what a continued model learned of new text and forgot of old: words, curves, losses by domain."""

from collections.abc import Iterable

from scionlm.report.collect import Run
from scionlm.report.forgetting_charts import course_figure, first_steps
from scionlm.report.forgetting_read import Forgetting, Side, forgetting_of, side_of
from scionlm.report.forgetting_words import told
from scionlm.report.html import Content, Markup, RowGroup, join, name_of, section, table, tag
from scionlm.report.wording import NONE, nats, signed

_MAX_DOMAINS = 20


def forgetting_section(run: Run) -> Markup | None:
    """Return what a run that continues learned and forgot; None for others, and while nothing is known."""
    forgetting = forgetting_of(run)
    if forgetting is None:
        return None
    body = join(
        told(run, forgetting),
        course_figure(run, forgetting),
        first_steps(run, forgetting),
        _losses(run, forgetting),
        _stages(forgetting),
    )
    title = "What was learned, and what was forgotten"
    return section("forgetting", title, body)


def _losses(run: Run, forgetting: Forgetting) -> Markup:
    """Return before, peak and after of both sides, and of each domain under them."""
    sides = (
        ("Upstream: what the model knew before", "upstream", forgetting.upstream),
        ("Downstream: the new text", "child", forgetting.downstream),
    )
    groups = [RowGroup(title, list(_rows(run, side, tone))) for title, tone, side in sides if side is not None]
    header = ("", "before", "peak", "at step", "after" if forgetting.final else "now", "change")
    caption = "Held-out loss in nats per token; lower is better"
    most = max((len(side.domains) for _, _, side in sides if side is not None), default=0)
    cut = (
        f"Of each the first {_MAX_DOMAINS} domains; the others are under Losses by domain."
        if most > _MAX_DOMAINS
        else ""
    )
    note = (
        "Forgotten: by how much the upstream mean rose. Learned: by how much the downstream mean fell. Both are plain "
        "means over domains, of the same held-out tokens before and after; their difference weighs a nat of one like a "
        "nat of the other. Peak: the highest of the losses that were measured on the way. "
    )
    return join(table("forgetting-losses", caption, header, groups), tag("p", note + cut, class_="note"))


def _rows(run: Run, side: Side, tone: str) -> Iterable[tuple[Content, ...]]:
    several = len(side.domains) != 1
    if several:
        yield (tag("b", "mean", class_=tone), *_cells(side))
    for name in side.domains[:_MAX_DOMAINS]:
        own = side_of(run, (name,)) if several else side
        title = name_of(name, 60) if several else tag("b", name_of(name, 60), class_=tone)
        yield (title, *(_cells(own) if own else [NONE] * 5))


def _cells(side: Side) -> list[Content]:
    peak = side.peak
    at = NONE if peak is None else f"{peak.step:,}" if peak.step else "start"
    return [nats(side.before, 3), nats(peak.nll if peak else None, 3), at, nats(side.after, 3), signed(side.change)]


def _stages(forgetting: Forgetting) -> Markup | None:
    """Return how much of each stage's text was forgotten by what came after it."""
    if len(forgetting.stages) < 2:
        return None
    rows: list[tuple[Content, ...]] = [
        (
            name_of(one.name or NONE, 40),
            tag(
                "span",
                [[", " if k else "", name_of(name, 40)] for k, name in enumerate(one.domains[:6])],
                class_="left",
            ),
            nats(one.before, 3),
            nats(one.at_its_end, 3),
            nats(one.after, 3),
            signed(one.change),
        )
        for one in forgetting.stages
    ]
    header = (
        "stage",
        tag("span", "text first seen in it", class_="left"),
        "before",
        "at its end",
        "at the end",
        "change",
    )
    caption = "What each stage learned, and what later stages cost it; nats per token, lower is better"
    return table("forgetting-stages", caption, header, [RowGroup(None, rows)])
