"""Attention before and after: rank and mass of each layer that was inherited, in the source and in the trained child.

Drawn from an analysis in the run folder that sets the two side by side; its own page has the rest.
"""

import shlex
from collections.abc import Sequence

from scionlm.report.analysis_beside import beside_charts, places_in
from scionlm.report.analysis_read import MAX_ROWS, Look, of
from scionlm.report.collect import Run
from scionlm.report.html import Content, Markup, RowGroup, clip, section, table, tag
from scionlm.report.values import mapping, text
from scionlm.report.wording import exact, index_ranges, nats, signed

_NAMES = ("source", "child")

# Closer than this two mean ranks are the same: a head's rank is a whole number, and a mean of many samples.
_SAME = 0.05


def attention_section(run: Run) -> Markup | None:
    """Return rank and mass of the layers before and after; None where no analysis of both is in the run folder."""
    looks = _looks(run)
    if looks is None:
        return None
    source, child = looks
    came_from = places_in(child, source.name, source.num_layers)
    pairs = [(int(index), k) for k, index in enumerate(came_from or [])]
    return section(
        "attention",
        "Attention before and after",
        tag("p", _said(source, child, pairs)),
        tag("p", _note(run), class_="note"),
        *beside_charts(source, child, _NAMES),
        _table(source, child, pairs),
    )


def _looks(run: Run) -> tuple[Look, Look] | None:
    """Return source and child as analysed; None of nothing, or of a model that has not the child's layers."""
    record = run.analysis
    against = mapping(record.get("against"))
    child = Look(record)
    layers = run.shape.get("num_hidden_layers")
    if not against or not child.layers or not Look(against).layers or layers not in (None, child.num_layers):
        return None
    # Both were measured on the same sequences, and only the first says how long these were.
    source = Look({**against, "seq_len": record.get("seq_len")})
    keep, total = run.inherit.keep, source.num_layers
    known = places_in(child, source.name, total) is not None
    if known or run.inherit.init == "random" or len(keep) != child.num_layers or max(keep) >= total:
        return source, child
    # The child knows its source by another name; the run knows which layers it took.
    steps = [[{"name": source.name, "index": index, "of": total}] for index in keep]
    return source, Look({**record, "model": {**child.model, "origins": steps}})


def _said(source: Look, child: Look, pairs: Sequence[tuple[int, int]]) -> str:
    """What happened to the ranks, in words."""
    before, after = source.column("max_rank"), child.column("max_rank")
    both = [(x, y) for i, k in pairs if (x := _at(before, i)) is not None and (y := _at(after, k)) is not None]
    sentences: list[str] = []
    if both:
        up, down = (sum(sign * (y - x) > _SAME for x, y in both) for sign in (1, -1))
        means = (sum(values) / len(both) for values in zip(*both, strict=True))
        first, last = (nats(mean) for mean in means)
        sentences.append(
            f"Of the {of(len(both), 'layer')} that came from the source, MaxRank is higher than there in {up} and "
            f"lower in {down}; the mean went from {first} to {last}."
        )
    if all("lazy_layers" in one.overall for one in (source, child)):
        sentences.append(
            f"Lazy layers, in which attention gives every token nearly the same: {_lazy(source)} in the source, "
            f"{_lazy(child)} in the child."
        )
    return " ".join(sentences)


def _lazy(look: Look) -> str:
    named = f" ({clip(index_ranges(look.lazy), 80)})" if look.lazy else ""
    return f"{len(look.lazy)} of {exact(look.num_layers)}{named}"


def _note(run: Run) -> str:
    what = "training" if run.continues else "cutting and training together"
    return (
        "MaxRank and mean mass of a layer in the source, and of the child's layer that came from it, on the same text: "
        f"the difference is what {what} made of it. A higher rank is not a lower loss. More is in the folder "
        f"{run.analysis_name}."
    )


def _at(column: Sequence[float | None], index: int) -> float | None:
    return column[index] if index < len(column) else None


def _table(source: Look, child: Look, pairs: Sequence[tuple[int, int]]) -> Markup | None:
    if not pairs:
        return None
    columns = [(source.column(key), child.column(key)) for key in ("max_rank", "mean_mass")]
    body: list[list[Content]] = []
    for index, k in pairs[:MAX_ROWS]:
        values = [(_at(before, index), _at(after, k)) for before, after in columns]
        body.append([exact(k), exact(index), *(cell for one in values for cell in _cells(*one))])
    left_out = len(pairs) - len(body)
    more = f"; {of(left_out, 'more layer')} in analysis.json" if left_out else ""
    header = (
        "layer of the child",
        "of the source",
        "MaxRank before",
        "after",
        "change",
        "mass before",
        "after",
        "change",
    )
    caption = f"Before: the source; after: the child; sequences of {child.seq_len}{more}"
    return table("attention-table", caption, header, [RowGroup(None, body)])


def _cells(before: float | None, after: float | None) -> tuple[str, str, str]:
    change = None if before is None or after is None else after - before
    return nats(before), nats(after), signed(change, 2)


def attention_command(run: Run) -> Markup | None:
    """Return the command that would make the analysis that is missing; None where there is one, or none can be."""
    source = text(run.config, "source") or ("RUN/reference/model" if run.config.get("reference") else None)
    if not run.finished or source is None or run.inherit.init == "random" or _looks(run) is not None:
        return None
    data = text(mapping(run.manifest.get("data")), "dir") or text(mapping(run.config.get("data")), "dir")
    named = f"--against {shlex.quote(source)} --data {shlex.quote(data) if data else 'DATA'}"
    line = f"scion analyze RUN/model {named} -o RUN/{run.analysis_name}"
    return tag(
        "p",
        "For attention before and after on this page, with this folder for RUN: ",
        tag("code", clip(line, 1_000)),
        ", then ",
        tag("code", "scion report RUN"),
        ".",
        class_="note",
    )
