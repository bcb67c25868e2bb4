"""What a comparison says in sentences, for the page, the table for a pull request and the command line."""

from collections.abc import Sequence

from scionlm.report.compare_frontier import Frontier, Point
from scionlm.report.compare_join import Comparison, Group, Judged
from scionlm.report.wording import listing, nats, percent

# A sentence that names more of them is a list, and the table has that.
_MAX_NAMED = 6


class Name(str):
    """A name from a run in a sentence: the page keeps it apart from the words around it."""

    __slots__ = ()


Sentence = Sequence[str]


def headline(comparison: Comparison) -> Sentence:
    """Return what won, and by how much."""
    groups = contenders(comparison)
    if not groups:
        return ["None of these has final losses that compare yet."]
    best = groups[0]
    over = f"mean over {len(comparison.domains)} domains" if len(comparison.domains) != 1 else "of the one domain"
    among = ["Of the runs, "] if len(groups) < len(comparison.groups) else []
    parts: list[str] = [*among, Name(best.name), f" has the lowest held-out loss: {nats(best.mean, 3)} nats ({over})"]
    if len(groups) > 1:
        parts += [f", {nats(groups[1].mean - best.mean, 3)} below ", Name(groups[1].name), ", the next best"]
    if best.gap is not None:
        closes = f"it closes {percent(best.gap)} of the gap between control and source"
        parts.append(f"; {'it is better than the source' if best.gap > 1 else closes}")
    return [*parts, "."]


def contenders(comparison: Comparison) -> list[Group]:
    """Return the groups that can win, the best first: those that were trained, or models where there are no others."""
    groups = list(comparison.groups)
    return [group for group in groups if group.first.kind != "model"] or groups


def verdict(comparison: Comparison) -> list[Sentence]:
    """Return the sentences that say what the headline is worth, and what does not compare."""
    sentences = (
        *frontier_words(comparison.frontier),
        _spread(comparison),
        *_left_out(comparison),
        _unfinished(comparison),
    )
    return [sentence for sentence in sentences if sentence]


def frontier_words(frontier: Frontier | None) -> list[Sentence]:
    """Return which run that continues a model is recommended, with its settings, and what that is worth."""
    if frontier is None:
        return []
    chosen, candidates = frontier.recommended, frontier.candidates
    best = chosen or candidates[0]
    parts: list[str] = ["Frontier: ", Name(best.name), f" {balance_words(best)}"]
    if chosen is None:
        last = "which is less than its source is worth" if len(candidates) == 1 else "the largest, and still a loss"
        return [[*parts, f", {last}."], *_of_baselines(frontier)]
    sentences: list[Sentence] = [[*parts, *(_choice(frontier, chosen) if len(candidates) > 1 else ["."])]]
    if frontier.tied:
        names = _names([point.name for point in frontier.tied])
        several = len(frontier.tied) > 1
        sentences.append(
            ["The spread of the seeds does not tell its net from ", "those of " if several else "that of ", *names,
             f", which forget{'' if several else 's'} more."]
        )  # fmt: skip
    return [*sentences, *_of_baselines(frontier)]


def balance_words(point: Point) -> str:
    """Return what a point forgets and gains, and the difference."""
    forgets, gains, net = (value.mean for value in (point.forgetting, point.adaptation, point.net))
    lost = f"forgets {nats(forgets, 3)}" if forgets >= 0 else f"forgets nothing ({nats(-forgets, 3)} better)"
    gained = f"gains {nats(gains, 3)} nats" if gains >= 0 else f"loses {nats(-gains, 3)} nats on the new text too"
    return f"{lost} and {gained}, net {nats(net, 3)}"


def _choice(frontier: Frontier, chosen: Point) -> list[str]:
    """Return the word that it is recommended, with the settings that are not the same in all."""
    told = [(key, chosen.settings[key]) for key in frontier.differing if key in chosen.settings]
    parts: list[str] = []
    for k, (key, value) in enumerate(told):
        parts += [", " if k else "", f"{key} ", Name(value)]
    return ["; recommended", *([" (", *parts, ")"] if parts else []), "."]


def _of_baselines(frontier: Frontier) -> list[Sentence]:
    """Return sentences on a baseline that is worth more, and on what cannot be set against the others."""
    found: list[Sentence] = []
    best = frontier.candidates[0]
    above = next((point for point in frontier.points if point.baseline and point.net.mean > best.net.mean), None)
    if above is not None:
        found.append(["A baseline is worth more: ", Name(above.name), f" {balance_words(above)}."])
    if frontier.left_out:
        names = _names(list(frontier.left_out))
        found.append(["Not on the frontier, as they name other domains as upstream: ", *names, "."])
    return found


def _spread(comparison: Comparison) -> Sentence | None:
    groups = [group for group in contenders(comparison) if group.first.kind != "model"]
    if not groups:
        return None
    best = groups[0]
    if best.std is None:
        return ["With one seed each no spread is known." if _single(groups) else "Of the best there is one seed only."]
    spread = f"Over {len(best.members)} seeds its standard deviation is {nats(best.std, 3)}"
    if len(groups) == 1:
        return [f"{spread}."]
    other = groups[1]
    if other.std is None:
        return [f"{spread}; of the next best there is one seed only."]
    spread = f"{spread}, that of the next best {nats(other.std, 3)}"
    if other.behind is None:  # each has seeds of its own
        within = other.mean - best.mean <= best.std + other.std
        told = "within that spread: no winner is known" if within else "more than that"
        return [f"{spread}; their difference is {told}."]
    apart, behind = f"{nats(other.behind.mean, 3)} \u00b1 {nats(other.behind.std, 3)}", other.behind
    seeds = f"all {behind.seeds}" if behind.worse == behind.seeds else f"{behind.worse} of {behind.seeds}"
    told = "" if behind.worse == behind.seeds else ": no winner is known"
    return [f"{spread}; seed by seed the best is {apart} lower, in {seeds} of them{told}."]


def _single(groups: Sequence[Group]) -> bool:
    return all(group.std is None for group in groups)


def _left_out(comparison: Comparison) -> list[Sentence]:
    """Return one sentence that names what does not compare, with the reason of each."""
    strange = [one for one in comparison.rows if one.reason is not None]
    if not strange:
        return []
    reasons: dict[str, list[Judged]] = {}
    for one in strange:
        reasons.setdefault(str(one.reason), []).append(one)
    parts: list[str] = ["Not comparable with the others: "]
    for k, (reason, ones) in enumerate(reasons.items()):
        parts += ["; " if k else "", *_names([one.row.name for one in ones]), f" ({reason})"]
    return [[*parts, "."]]


def _unfinished(comparison: Comparison) -> Sentence | None:
    found: dict[str, list[str]] = {}
    for one in comparison.rows:
        if not one.row.done and one.row.kind == "run":
            found.setdefault(one.row.state, []).append(one.row.name)
    if not found:
        return None
    parts: list[str] = ["Without a final loss: "]
    for k, (state, names) in enumerate(found.items()):
        parts += ["; " if k else "", *_names(names), f" ({'state ' if state == 'unknown' else ''}{state})"]
    return [*parts, "."]


def _names(names: Sequence[str]) -> list[str]:
    shown = list(names[:_MAX_NAMED])
    parts: list[str] = []
    for k, name in enumerate(shown):
        parts += [", " if k else "", Name(name)]
    return [*parts, f" and {len(names) - len(shown)} more"] if len(names) > len(shown) else parts


def text(sentence: Sentence) -> str:
    """Return a sentence as plain text."""
    return "".join(sentence)


def behind_words(comparison: Comparison) -> str:
    """Return what behind is; empty where nothing can be said of it."""
    if not any(group.behind for group in comparison.groups):
        return ""
    return "Behind: above the best, mean and standard deviation over the seeds that both have, each beside its own."


def pruned_words(comparison: Comparison) -> str:
    """Return what counts as the tokens of those that were pruned, empty where none was."""
    if not any(one.row.pruned for one in comparison.rows):
        return ""
    return "Tokens, FLOPs and time of those that were pruned count the pruning."


def sides_words(comparison: Comparison) -> str:
    """Return what upstream and downstream are, and what counts as forgotten and gained; empty without a frontier."""
    if comparison.frontier is None:
        return ""
    field = comparison.frontier.field
    old, new = (listing(list(names)[:_MAX_NAMED]) for names in (field.upstream, field.downstream))
    return (
        f"Upstream, what was known before, is the mean over {old}; downstream that over {new}. Forgets and gains are "
        "counted from the source: by how much upstream is higher, and downstream lower."
    )


def measured(comparison: Comparison) -> str:
    """Return how the losses that compare were measured."""
    setup = comparison.setup
    if not comparison.domains:
        return "Nothing has been measured yet."
    counts = sorted({count for _, count in setup.num_tokens or ()})
    ends = " to ".join(f"{count:,}" for count in (*counts[:1], *counts[1:][-1:]))
    budget = f" over {ends} tokens a domain"
    windows = f" in windows of {setup.seq_len} + 1 tokens" if setup.seq_len else ""
    what = "Held-out nll in nats" + (budget if counts else "") + windows
    return f"{what}; the mean is the plain one over {listing(list(comparison.domains)[:_MAX_NAMED])}."
