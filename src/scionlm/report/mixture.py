"""How the mixture moved by a ramp, from stage to stage or where a domain came to its end: charts, and what was taken.

Weights that followed the losses are in `weights`, with what moved them.
"""

from collections.abc import Iterable, Sequence

from scionlm.report.collect import Run
from scionlm.report.html import Content, Markup, RowGroup, clip, join, name_of, section, table, tag
from scionlm.report.mixture_read import Mixing, Taken
from scionlm.report.weights import share_charts, share_words
from scionlm.report.wording import exact

_DOMAINS, _ROWS = 40, 20


def mixture_section(run: Run) -> Markup | None:
    """Return how the shares of the domains moved; None where they stayed, or followed the losses."""
    mixing = run.mixing
    if not mixing.moves or run.child.curves.moves:
        return None
    lines = {_named(name): line for name, line in mixing.lines.items()}
    body = join(
        tag("p", _note(mixing), class_="note"),
        share_charts("share", "Share of one domain", lines, [at for at, _ in mixing.stages[1:]]),
        _table(mixing),
    )
    return section("mixture", "Mixture of the domains", body)


def _named(domain: str) -> str:
    return "replayed" if domain == "replay:" else domain


def _note(mixing: Mixing) -> str:
    said = (
        "The share of each domain in what was trained on, over tokens, all on the same scale: the weights that were in "
        "force, by the run's ledger. What was taken by them is counted below, up to the newest checkpoint."
    )
    if not mixing.stages:
        return said
    return f"{said} An upright line is where a stage begins: {clip(', '.join(name for _, name in mixing.stages), 400)}."


def _table(mixing: Mixing) -> Markup | None:
    """Return what was taken, by domain, from one checkpoint to the next."""
    rows = _merged(mixing.taken)
    if not rows:
        return None
    groups = [RowGroup(name_of(_named(name)), list(_rows(rows, name))) for name in list(mixing.lines)[:_DOMAINS]]
    left_out = len(mixing.lines) - len(groups)
    more = f"; {left_out} more domains are in the ledger" if left_out else ""
    header = ("up to step", "stage", "sequences", "tokens", "share")
    return table("mixture-table", f"Taken of each domain, from checkpoint to checkpoint{more}", header, groups)


def _rows(taken: Sequence[Taken], domain: str) -> Iterable[tuple[Content, ...]]:
    for one in taken:
        count = one.sequences.get(domain, 0)
        share = count / sum(one.sequences.values())
        yield exact(one.step), name_of(one.stage, 40), exact(count), exact(count * one.seq_len), share_words(share)


def _merged(taken: Sequence[Taken]) -> list[Taken]:
    """Return at most about as many rows as a table holds, each of neighbors of the same stage together."""
    stages = list(dict.fromkeys(one.stage for one in taken))
    merged: list[Taken] = []
    for stage in stages:
        mine = [one for one in taken if one.stage == stage]
        size = -(-len(mine) // max(1, _ROWS // len(stages)))
        for start in range(0, len(mine), size):
            some = mine[start : start + size]
            names = dict.fromkeys(name for one in some for name in one.sequences)
            counts = {name: sum(one.sequences.get(name, 0) for one in some) for name in names}
            merged.append(Taken(stage, some[-1].step, some[-1].seq_len, counts))
    return merged
