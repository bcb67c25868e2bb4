"""What an analysis found, in words and no further than its numbers go."""

from statistics import median

from scionlm.report.analysis_read import Look, finite, known, of, rows, short
from scionlm.report.html import Content, Markup, join, name_of, tag
from scionlm.report.values import integer, text
from scionlm.report.wording import exact, index_ranges, listing, nats, percent

# A part of all rank-1 heads that is worth saying where it is.
_MOST = 0.6


def headline(look: Look, other: Look | None) -> Markup:
    """Return the finding: one sentence in large letters, and below it what else is worth knowing at once."""
    below = [part for part in (_worth(look), _beside(look, other) if other else None) if part is not None]
    return join(tag("p", *_lead(look), class_="lead"), [tag("p", part, class_="verdict") for part in below])


def _lead(look: Look) -> list[Content]:
    total = look.num_layers
    if "lazy_layers" not in look.overall or not total:
        return ["The analysis does not say whether attention has collapsed."]
    lazy = look.lazy
    if not lazy:
        said: list[Content] = [tag("strong", "No layer is lazy", class_="child")]
    else:
        verb = "is" if len(lazy) == 1 else "are"
        said = [tag("strong", f"{len(lazy)} of {of(total, 'layer')} {verb} lazy", class_="control")]
        said.append(f" (layer{'' if len(lazy) == 1 else 's'} {index_ranges(lazy)})")
    return [*said, f" on sequences of {look.seq_len}", _heads(look, joined=bool(lazy)), _group(look), "."]


def _heads(look: Look, joined: bool) -> str:
    """The share of rank-1 heads, and where most of them are."""
    ratio, count = finite(look.overall, "rank1_head_ratio"), integer(look.overall, "num_heads")
    if ratio is None or not count:
        return ""
    if not ratio:
        return f", and none of its {count:,} heads is of rank 1" if count > 1 else ", and its head is not of rank 1"
    ratios = look.column("rank1_head_ratio")
    half, whole = len(ratios) // 2, sum(known(ratios))  # of an odd number of layers the middle one is in neither
    halves = {"first": ratios[:half], "second": ratios[len(ratios) - half :]}
    shares = {name: sum(known(part)) / whole if whole > 0 else 0.0 for name, part in halves.items()}
    place, share = max(shares.items(), key=lambda one: one[1])
    place = place if share >= _MOST else None
    said = f", {percent(share)} of these in the {place} half of the layers" if place else ""
    return f", {'and' if joined else 'but'} {percent(ratio)} of its {count:,} heads are of rank 1{said}"


def _group(look: Look) -> str:
    """Whether there is a lazy group: a half of the layers, or else all from some layer on."""
    groups = rows(look.record, "groups")
    lazy = [group for group in groups if group.get("lazy") is True]
    if lazy:
        names = listing([f"the {short(text(group, 'name') or 'part')}" for group in lazy])
        ranks = listing([nats(finite(group, "avg_rank")) for group in lazy])
        verb = "is a lazy group" if len(lazy) == 1 else "are lazy groups"
        return f"; {names} of the layers {verb} (AvgRank {ranks})"
    if "lazy_group_from" not in look.overall:
        return ""
    first = integer(look.overall, "lazy_group_from")
    if first is not None and 0 < first < look.num_layers - 1:
        return f"; layers {first} to {look.num_layers - 1} are a lazy group"
    return "; there is no lazy group"


def _worth(look: Look) -> Content:
    """What lazy layers cost when they are taken out: lazy is not worthless."""
    removal = look.column("removal")
    costs = {k: value for k, value in enumerate(removal) if value is not None}
    lazy = [k for k in look.lazy if k in costs]
    if not lazy or len(lazy) == len(costs):
        return None
    if len(lazy) == 1:
        place = 1 + sum(value > costs[lazy[0]] for value in costs.values())
        return (
            f"Without layer {lazy[0]} alone the loss is {_change(costs[lazy[0]])}, place {place} of {len(costs)} "
            f"when layers are ordered by what taking them out costs{_moral(place, len(costs))}."
        )
    others = median(value for k, value in costs.items() if k not in lazy)
    return (
        "Taken out one at a time, the lazy layers change the loss by "
        f"{nats(median(costs[k] for k in lazy), 3)} nats at the median, the others by {nats(others, 3)}."
    )


def _moral(place: int, total: int) -> str:
    return ": lazy does not mean worthless here" if 2 * place <= total else ""


def _change(cost: float) -> str:
    return f"{nats(abs(cost), 3)} nats {'higher' if cost >= 0 else 'lower'}"


def _beside(look: Look, other: Look) -> Content:
    here, there = len(look.lazy), len(other.lazy)
    total, others = look.num_layers, other.num_layers
    if not others or not total or "lazy_layers" not in other.overall or "lazy_layers" not in look.overall:
        return None
    name = tag("b", name_of(other.name, 48))
    said: list[Content]
    if not here and not there:
        said = ["In ", name, f" no layer is lazy either (of {others})"]
    elif not there:
        said = ["In ", name, f" there is no lazy layer (of {others}), here {of(here, 'lazy layer')} (of {total})"]
    elif not here:
        said = [name, f" has {of(there, 'lazy layer')} (of {others}), where here there is none (of {total})"]
    else:
        shares = there / others, here / total
        more = "a larger" if shares[0] > shares[1] else "a smaller" if shares[0] < shares[1] else "the same"
        said = ["In ", name, f" {more} share of layers is lazy: {there} of {others}, here {here} of {total}"]
    return [*said, _compared_heads(look, other), ".", _compared_loss(look, other)]


def _compared_heads(look: Look, other: Look) -> str:
    shares = [finite(one.overall, "rank1_head_ratio") for one in (other, look)]
    if shares[0] is None or shares[1] is None:
        return ""
    return f"; {percent(shares[0])} of its heads are of rank 1, here {percent(shares[1])}"


def _compared_loss(look: Look, other: Look) -> str:
    """The loss beside the ranks: a model with higher ranks is not for that the better one."""
    theirs, ours = (finite(one.overall, "nll") for one in (other, look))
    if theirs is None or ours is None:
        return ""
    said = f" Its loss is {nats(theirs)}, here {nats(ours)}"
    ranks = [finite(one.overall, "rank1_head_ratio") for one in (other, look)]
    if ranks[0] is None or ranks[1] is None or ranks[0] == ranks[1] or theirs == ours:
        return f"{said}."
    agree = (ranks[0] < ranks[1]) == (theirs < ours)
    return f"{said}." if agree else f"{said}: the one with fewer rank-1 heads is not the one with the lower loss."


def tiles(look: Look) -> Markup:
    """Return the numbers that a reader looks for first."""
    overall, model = look.overall, look.model
    heads, per_layer = integer(overall, "num_heads"), integer(model, "num_attention_heads")
    ratio, sink = finite(overall, "rank1_head_ratio"), finite(overall, "sink_at_first_token")
    loss = integer(look.record, "loss_sequences")
    lazy = f"{len(look.lazy)} of {look.num_layers}" if "lazy_layers" in overall else None
    pairs = (
        (exact(look.num_layers), "layer" if look.num_layers == 1 else "layers"),
        (exact(heads), f"heads, {per_layer:,} in each layer" if per_layer else "heads"),
        (lazy, "lazy layers"),
        (None if ratio is None else percent(ratio), "of heads are of rank 1"),
        (None if sink is None else percent(sink), "of sinks at the first token"),
        (nats(finite(overall, "nll")), f"loss in nats, on {of(loss, 'sequence')}" if loss else "loss in nats"),
    )
    return tag(
        "dl",
        [tag("div", tag("dt", what), tag("dd", shown if shown is not None else "\u2013")) for shown, what in pairs],
        class_="tiles",
    )
