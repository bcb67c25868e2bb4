"""The table of a comparison: what each row shows, the same on the page and in the table for a pull request."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scionlm.report.compare_join import Base, Comparison, Group, Judged, mean_of
from scionlm.report.compare_words import headline, measured, text, verdict
from scionlm.report.html import clip, escape
from scionlm.report.wording import NONE, count, duration, nats, percent, scientific

# More columns are not read, and the whole is in compare.json.
MAX_DOMAINS = 12
_MAX_NAME = 80
_DIGITS = 3
_MARKS = {"|": "\\|", "\\": "\\\\", "*": "\\*", "_": "\\_", "`": "\\`", "[": "\\[", "]": "\\]", "~": "\\~"}


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
    return ["run", "mean nll", "gap closed", *domains, "layers", "parameters", "seed", "tokens", "FLOPs", "time"]


def lines(comparison: Comparison) -> list[Line]:
    """Return the rows: the sources, the groups from the best on with their members, then what is not ranked."""
    domains = comparison.domains[:MAX_DOMAINS]
    found = [_source(base, domains, comparison.domains) for base in comparison.sources]
    for group in comparison.groups:
        found += _group(group, domains)
    return found + [_row(one, domains, "other") for one in comparison.rows if not one.ranked]


def _source(base: Base, domains: Sequence[str], every: Sequence[str]) -> Line:
    mean = nats(mean_of(base.losses, every), _DIGITS)
    sizes = [_whole(base.num_layers), count(base.num_parameters)]
    return Line("source", base.name, [mean, NONE, *_losses(base.losses, domains), *sizes, *[NONE] * 4], "source")


def _group(group: Group, domains: Sequence[str]) -> Iterable[Line]:
    kind = "best" if group.best else "group"
    if len(group.members) == 1:
        yield _row(group.members[0], domains, kind)
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
            *_losses(means, domains),
            _whole(row.num_layers),
            count(row.num_parameters),
            f"{len(group.members)} seeds",
            count(row.tokens),
            *[NONE] * 2,
        ],
    )
    for one in group.members:
        yield _row(one, domains, "member")


def _row(one: Judged, domains: Sequence[str], kind: str) -> Line:
    row = one.row
    notes = [row.state] if not row.done else []
    notes += ["not comparable"] if one.reason else []
    notes += ["model"] if row.kind == "model" else ["control"] if row.is_control and row.kind == "run" else []
    cells = [
        nats(one.mean, _DIGITS),
        _share(one.gap),
        *_losses(row.losses, domains),
        _whole(row.num_layers),
        count(row.num_parameters),
        _whole(row.seed),
        count(row.tokens),
        scientific(row.flops) if row.flops else NONE,
        duration(row.seconds) or NONE,
    ]
    return Line(kind, row.name, cells, ", ".join(notes))


def _losses(losses: Mapping[str, float], domains: Sequence[str]) -> list[str]:
    return [nats(losses.get(name), _DIGITS) for name in domains]


def _whole(value: int | None) -> str:
    return NONE if value is None else f"{value}"


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown: what won, and the table."""
    columns = header(comparison)
    sentences = [headline(comparison), *verdict(comparison)]
    rows = [f"| {' | '.join(_safe(cell) for cell in columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for line in lines(comparison):
        name = _safe(clip(line.name, _MAX_NAME))
        strong = line.kind == "best"
        cells = [f"**{_safe(cell)}**" if strong and cell != NONE else _safe(cell) for cell in line.cells]
        indent = "\u21b3 " if line.kind == "member" else ""
        note = f" ({_safe(line.note)})" if line.note else ""
        rows.append(f"| {indent}{f'**{name}**' if strong else name}{note} | {' | '.join(cells)} |")
    words = [_safe(text(sentence)) for sentence in sentences]
    parts = [f"**{words[0]}**", " ".join(words[1:]), "\n".join(rows), _safe(measured(comparison))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _safe(value: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    plain = " ".join(value.split())
    return "".join(_MARKS.get(character, character) for character in escape(plain))
