"""The table of a comparison: what each row shows, the same on the page and in the table for a pull request."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scionlm.report.compare_frontier import Balance, Frontier
from scionlm.report.compare_join import Base, Behind, Comparison, Group, Judged
from scionlm.report.compare_read import Row
from scionlm.report.compare_tasks_page import tasks_markdown
from scionlm.report.compare_words import behind_words, headline, measured, pruned_words, sides_words, text, verdict
from scionlm.report.findings import mean_of
from scionlm.report.html import clip
from scionlm.report.markdown import safe
from scionlm.report.pruning_read import method_words
from scionlm.report.wording import NONE, count, duration, nats, percent, scientific, signed

# More columns are not read, and the whole is in compare.json.
MAX_DOMAINS = 12
_MAX_NAME = 80
_DIGITS = 3


@dataclass(frozen=True)
class Line:
    """A row of the table: `kind` is source, best, group, member or other; `note` says what is special about it."""

    kind: str
    name: str
    cells: Sequence[str]
    note: str = ""


def header(comparison: Comparison) -> list[str]:
    """Return the names of the columns."""
    domains = [f"{name}, nll" for name in comparison.domains[:MAX_DOMAINS]]
    sides = ["upstream", "downstream", "forgets", "gains"] if comparison.frontier else []
    return [
        "run",
        "mean nll",
        *(["behind"] if any(group.behind for group in comparison.groups) else []),
        "gap closed",
        *sides,
        *domains,
        "layers",
        "parameters",
        "seed",
        "tokens",
        "FLOPs",
        "time",
    ]


def lines(comparison: Comparison) -> list[Line]:
    """Return the rows: the sources, the groups from the best on with their members, then what is not ranked."""
    domains = comparison.domains[:MAX_DOMAINS]
    frontier = comparison.frontier
    found = [_source(base, domains, comparison) for base in comparison.sources]
    apart: dict[int, str] = {}
    for group in comparison.groups:
        if group.behind:
            apart[len(found)] = _apart(group.behind)
        found += _group(group, domains, frontier)
    found += [_row(one, domains, "other", frontier) for one in comparison.rows if not one.ranked]
    if not apart:
        return found
    return [replace(line, cells=[line.cells[0], apart.get(k, NONE), *line.cells[1:]]) for k, line in enumerate(found)]


def _apart(behind: Behind) -> str:
    return f"{nats(behind.mean, _DIGITS)} \u00b1 {nats(behind.std, _DIGITS)}"


def _source(base: Base, domains: Sequence[str], comparison: Comparison) -> Line:
    mean = nats(mean_of(base.losses, comparison.domains), _DIGITS)
    sizes = [_whole(base.num_layers), count(base.num_parameters)]
    sides: list[str] = []
    if comparison.frontier is not None:
        field = comparison.frontier.field
        means = [nats(mean_of(base.losses, names), _DIGITS) for names in (field.upstream, field.downstream)]
        sides = [*means, NONE, NONE]
    cells = [mean, NONE, *sides, *_losses(base.losses, domains), *sizes, *[NONE] * 4]
    return Line("source", base.name, cells, "source")


def _sides(balance: Balance | None, frontier: Frontier | None) -> list[str]:
    """Return the two means of a row and what they are against its start, where there is a frontier."""
    if frontier is None:
        return []
    if balance is None:
        return [NONE] * 4
    means = [nats(value, _DIGITS) for value in (balance.upstream, balance.downstream)]
    return [*means, *(signed(value, _DIGITS) for value in (balance.forgetting, balance.adaptation))]


def _group_sides(group: Group, frontier: Frontier | None) -> list[str]:
    """Return the same of several seeds, with the spread of what they forget and gain."""
    point = frontier.point_of(group.first.name) if frontier is not None else None
    if point is None:
        return _sides(None, frontier)
    changes = [
        signed(value.mean, _DIGITS) + (f" \u00b1 {nats(value.std, _DIGITS)}" if value.std is not None else "")
        for value in (point.forgetting, point.adaptation)
    ]
    return [nats(point.upstream.mean, _DIGITS), nats(point.downstream.mean, _DIGITS), *changes]


def _group(group: Group, domains: Sequence[str], frontier: Frontier | None) -> Iterable[Line]:
    kind = "best" if group.best else "group"
    if len(group.members) == 1:
        yield _row(group.members[0], domains, kind, frontier)
        return
    row = group.first
    means = {name: sum(one.row.losses[name] for one in group.members) / len(group.members) for name in row.losses}
    spread = f" \u00b1 {nats(group.std, _DIGITS)}" if group.std is not None else ""
    yield Line(
        kind,
        group.name,
        [
            nats(group.mean, _DIGITS) + spread,
            _share(group.gap),
            *_group_sides(group, frontier),
            *_losses(means, domains),
            _whole(row.num_layers),
            count(row.num_parameters),
            f"{len(group.members)} seeds",
            count(row.tokens),
            *[NONE] * 2,
        ],
        f"pruned {method_words(row.pruned)}" if row.pruned else "",
    )
    for one in group.members:
        yield _row(one, domains, "member", frontier)


def _row(one: Judged, domains: Sequence[str], kind: str, frontier: Frontier | None) -> Line:
    row = one.row
    notes = [row.state] if not row.done else []
    notes += ["not comparable"] if one.reason else []
    notes += [f"pruned {method_words(row.pruned)}"] if row.pruned and kind != "member" else []
    notes += ["model"] if row.kind == "model" else ["control"] if row.is_control and row.kind == "run" else []
    cells = [
        nats(one.mean, _DIGITS),
        _share(one.gap),
        *_sides(one.balance, frontier),
        *_losses(row.losses, domains),
        _whole(row.num_layers),
        count(row.num_parameters),
        _whole(row.seed),
        count(row.tokens),
        scientific(row.flops) if row.flops else NONE,
        _time(row),
    ]
    return Line(kind, row.name, cells, ", ".join(notes))


def _losses(losses: Mapping[str, float], domains: Sequence[str]) -> list[str]:
    return [nats(losses.get(name), _DIGITS) for name in domains]


def _whole(value: int | None) -> str:
    return NONE if value is None else f"{value}"


def _time(row: Row) -> str:
    taken = duration(row.seconds)
    return NONE if taken is None else taken + (f" \u00d7 {row.devices}" if row.devices > 1 else "")


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown: what won, and the table."""
    columns = header(comparison)
    sentences = [headline(comparison), *verdict(comparison)]
    rows = [f"| {' | '.join(safe(cell) for cell in columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for line in lines(comparison):
        name = safe(clip(line.name, _MAX_NAME))
        strong = line.kind == "best"
        cells = [f"**{safe(cell)}**" if strong and cell != NONE else safe(cell) for cell in line.cells]
        indent = "\u21b3 " if line.kind == "member" else ""
        note = f" ({safe(line.note)})" if line.note else ""
        rows.append(f"| {indent}{f'**{name}**' if strong else name}{note} | {' | '.join(cells)} |")
    words = [safe(text(sentence)) for sentence in sentences]
    notes = (measured(comparison), behind_words(comparison), sides_words(comparison), pruned_words(comparison))
    below = " ".join(note for note in notes if note)
    tasks = tasks_markdown(comparison.tasks)
    parts = [f"**{words[0]}**", " ".join(words[1:]), "\n".join(rows), safe(below), tasks]
    return "\n\n".join(part for part in parts if part) + "\n"
