"""The page of a comparison: what won, the final losses, the losses over tokens, and every run in one table."""

from scionlm.report.compare_charts import dot_chart, loss_chart, num_lines, operations_matter, tracks
from scionlm.report.compare_frontier_page import frontier_section
from scionlm.report.compare_join import Comparison
from scionlm.report.compare_pareto import pareto_chart
from scionlm.report.compare_table import MAX_DOMAINS, Line, header, lines
from scionlm.report.compare_tasks_page import task_sections
from scionlm.report.compare_words import Name, Sentence, behind_words, headline, measured, pruned_words, verdict
from scionlm.report.html import Content, Markup, RowGroup, card, clip, facts, join, name_of, page, section, table, tag
from scionlm.report.page import sprout
from scionlm.report.wording import count, exact

_MAX_ROWS = 200
_SHORT = 12  # such a name has no line break in it


def compare_page(comparison: Comparison, title: str) -> str:
    """Return the page of a comparison as one HTML document.

    Args:
        comparison: What to draw.
        title: Its name: that of its folder, or of the sweep.
    """
    runs = sum(one.row.kind == "run" for one in comparison.rows)
    header_ = join(
        tag("div", sprout(), tag("span", "Scion comparison"), tag("span", f"{runs} runs"), class_="eyebrow"),
        tag("h1", name_of(title)),
        tag("p", _marked(headline(comparison)), class_="lead"),
        [tag("p", _marked(sentence), class_="verdict") for sentence in verdict(comparison)],
    )
    main = join(
        frontier_section(comparison.frontier),
        _final(comparison),
        _losses(comparison),
        _sizes(comparison),
        task_sections(comparison.tasks),
        _table(comparison),
        _facts(comparison),
    )
    footer = tag("p", "Drawn from the folders of the runs alone; the numbers are in compare.json beside this page.")
    return str(page(f"{clip(title, 80)} \u2013 Scion comparison", header_, main, footer))


def _marked(sentence: Sentence) -> list[Content]:
    def strong(name: Name) -> Markup:
        return tag("strong", name_of(name), class_="short" if len(name) <= _SHORT else None)

    return [strong(part) if isinstance(part, Name) else part for part in sentence]


def _final(comparison: Comparison) -> Markup | None:
    picture, away = dot_chart(comparison)
    if picture is None:
        return None
    seeds = any(group.std is not None for group in comparison.groups)
    spread = " Large: the mean over seeds, with one standard deviation; small: each seed." if seeds else ""
    return section("result", "Final losses", card(picture, measured(comparison) + spread + away))


def _losses(comparison: Comparison) -> Markup:
    if not tracks(comparison):
        return section("curves", "Loss over tokens", tag("p", "No losses were recorded during training."))
    picture, cut = loss_chart(comparison)
    left_out = num_lines(comparison) - sum(len(track.lines) for track in tracks(comparison))
    note = "Held-out loss as the plain mean over the domains. Entries stand in the order of the final loss."
    note += (
        " Thin lines of one color are the seeds of one run."
        if any(len(t.members) > 1 for t in tracks(comparison))
        else ""
    )
    note += " A line of one that was pruned begins behind the tokens of its pruning." if _behind(comparison) else ""
    note += f" {left_out} more lines would not be told apart; their numbers are in the table." if left_out else ""
    return section(
        "curves",
        "Loss over tokens",
        card(picture, note + cut),
        _over_operations(comparison),
    )


def _over_operations(comparison: Comparison) -> Markup | None:
    if not operations_matter(comparison):
        return None
    picture, cut = loss_chart(comparison, by_operations=True)
    note = "The same losses over the operations spent: a token of a larger model, or with a teacher, costs more."
    note += " Operations of pruning are spread evenly over a line." if _behind(comparison) else ""
    return card(picture, note + cut)


def _sizes(comparison: Comparison) -> Markup | None:
    notes = {
        False: "No model of the same size or smaller is better than those on the line. Of seeds the mean is drawn.",
        True: "The same over the time that a written token takes, one sequence at a time.",
    }
    pictures = [(pareto_chart(comparison, by_time), note) for by_time, note in notes.items()]
    figures = [card(picture, note) for picture, note in pictures if picture is not None]
    return section("sizes", "Loss against size and speed", figures) if figures else None


def _behind(comparison: Comparison) -> bool:
    return any(one.row.pruning_tokens and one.row.curve for one in comparison.rows)


def _table(comparison: Comparison) -> Markup:
    columns = ["", *header(comparison)[1:]]
    every = lines(comparison)
    rows = [[_title(line), *_cells(line)] for line in every[:_MAX_ROWS]]
    caption = "Held-out nll in nats per token by domain; lower is better. The best is bold."
    hidden = [f"{len(comparison.domains) - MAX_DOMAINS} more domains"] if len(comparison.domains) > MAX_DOMAINS else []
    hidden += [f"{len(every) - _MAX_ROWS} more rows"] if len(every) > _MAX_ROWS else []
    more = tag("p", f"{' and '.join(hidden)} are in compare.json.", class_="note") if hidden else None
    gap = tag(
        "p",
        "Gap closed: (control \u2212 run) / (control \u2212 source), on means over the domains that the three share. "
        "The control has the same shape from random weights and saw the same tokens; a run without one has no share. ",
        f"{behind_words(comparison)} ",
        pruned_words(comparison),
        class_="note",
    )
    return section("runs", "Every run", table("run-table", caption, columns, [RowGroup(None, rows)]), more, gap)


def _title(line: Line) -> Markup:
    tone = {"source": "source", "best": "child"}.get(line.kind)
    name = tag("b", name_of(line.name, 60), class_=tone) if tone else name_of(line.name, 60)
    indent = tag("span", "\u21b3 ", class_="soft", aria_hidden="true") if line.kind == "member" else None
    note = tag("span", f" {line.note}", class_="soft") if line.note and line.note != line.kind else None
    return join(indent, name, note)


def _cells(line: Line) -> list[Content]:
    # A row of seeds is set back behind the row of their mean.
    return [tag("span", cell, class_="soft") if line.kind == "member" else cell for cell in line.cells]


def _facts(comparison: Comparison) -> Markup:
    setup = comparison.setup
    sources: list[tuple[Content, Content]] = [
        ("source", [name_of(base.name), f", {count(base.num_parameters)} parameters" if base.num_parameters else ""])
        for base in comparison.sources[:8]
    ]
    counts: list[tuple[Content, Content]] = [
        (name_of(name, 40), f"{exact(number)} tokens") for name, number in (setup.num_tokens or ())[:40]
    ]
    data: list[tuple[Content, Content]] = [
        ("data fingerprint", tag("code", clip(setup.data, 40)) if setup.data else None),
        ("window", f"{setup.seq_len:,} tokens" if setup.seq_len else None),
    ]
    columns = tag(
        "div",
        tag("div", tag("h3", "Measured"), facts([*sources, *data])),
        tag("div", tag("h3", "Held-out tokens by domain"), facts(counts)) if counts else None,
        class_="columns",
    )
    return section("facts", "What is compared", tag("p", measured(comparison)), columns)
